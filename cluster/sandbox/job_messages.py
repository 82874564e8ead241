"""Jobs and replies between a sandbox process and its parent: msgpack, each with its length before it.

A child that a hostile model has corrupted may send anything, so every message is bounded and validated.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from cluster.core.errors import BadFrame
from cluster.core.limits import MAX_SANDBOX_MESSAGE_BYTES
from cluster.core.request import ChatMessage, ChatOptions, Grammar

__all__ = [
    "CheckGrammar",
    "Converse",
    "Encode",
    "Job",
    "JobFailed",
    "Limits",
    "OpenModel",
    "PromptReply",
    "Ready",
    "Reply",
    "WarmUp",
    "pack_job",
    "pack_reply",
    "pack_tokens",
    "payload_size",
    "unpack_job",
    "unpack_reply",
    "unpack_tokens",
]

HEADER: Final = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one job may use: CPU seconds, bytes of memory beyond what the process holds, and seconds of wall time."""

    cpu_s: float
    memory_bytes: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Load the tokenizer in ``folder``, always the first job; with ``grammars``, prepare it to compile grammars."""

    folder: str
    grammars: bool
    limits: Limits
    kind: Literal["open"] = "open"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Compile the chat template by rendering a message, whatever the template says to it."""

    limits: Limits
    kind: Literal["warm_up"] = "warm_up"


@dataclass(frozen=True, slots=True)
class Encode:
    """Tokenize ``text``. At most ``max_tokens`` ids are returned; ``texts`` asks for the text of each token too."""

    text: str
    max_tokens: int
    texts: bool
    limits: Limits
    kind: Literal["encode"] = "encode"


@dataclass(frozen=True, slots=True)
class Converse:
    """Render a conversation with the chat template and tokenize it; ``max_tokens`` and ``texts`` as for ``Encode``."""

    messages: tuple[ChatMessage, ...]
    options: ChatOptions
    grammar: Grammar | None
    max_tokens: int
    texts: bool
    limits: Limits
    kind: Literal["converse"] = "converse"


@dataclass(frozen=True, slots=True)
class CheckGrammar:
    """Compile ``grammar`` and compute its first mask, as the last stage will."""

    grammar: Grammar
    limits: Limits
    kind: Literal["grammar"] = "grammar"


@dataclass(frozen=True, slots=True)
class Ready:
    """The job is done and returns nothing."""

    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True)
class PromptReply:
    """A tokenized prompt: ``count`` tokens; ``ids`` is empty where that exceeds the job's ``max_tokens``.

    ``ids`` are uint32 in native byte order. ``thinking`` and ``grammar`` are a conversation's.
    """

    count: int
    ids: bytes
    texts: tuple[str, ...] = ()
    thinking: bool = False
    grammar: Grammar | None = None
    kind: Literal["prompt"] = "prompt"


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job failed with the ``MacpipeError`` of that ``reason``, ``sentence`` and ``field``."""

    reason: str
    sentence: str
    field: str
    kind: Literal["failed"] = "failed"


Job = OpenModel | WarmUp | Encode | Converse | CheckGrammar
Reply = Ready | PromptReply | JobFailed
_JOBS: Final[TypeAdapter[Job]] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])
_REPLIES: Final[TypeAdapter[Reply]] = TypeAdapter(Annotated[Reply, Field(discriminator="kind")])


def pack_job(job: Job) -> bytes:
    """Serialize ``job`` with its length. Raises ``BadFrame`` for one larger than a message may be."""
    return _framed(_JOBS.dump_python(job))


def pack_reply(reply: Reply) -> bytes:
    """Serialize ``reply`` with its length. Raises ``BadFrame`` for one larger than a message may be."""
    return _framed(_REPLIES.dump_python(reply))


def unpack_job(body: bytes) -> Job:
    """Parse a job. Raises ``BadFrame``."""
    job: Job = _validated(_JOBS, body)
    return job


def unpack_reply(body: bytes) -> Reply:
    """Parse a reply. Raises ``BadFrame``."""
    reply: Reply = _validated(_REPLIES, body)
    return reply


def payload_size(header: bytes) -> int:
    """Read the length of the message that follows ``header``. Raises ``BadFrame`` for one that is too long."""
    (size,) = HEADER.unpack(header)
    if size > MAX_SANDBOX_MESSAGE_BYTES:
        raise BadFrame(f"a sandbox message has {size} bytes; at most {MAX_SANDBOX_MESSAGE_BYTES} are allowed")
    return int(size)


def pack_tokens(ids: Sequence[int]) -> bytes:
    """Serialize token ids as uint32."""
    return array("I", ids).tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """Parse token ids. Raises ``BadFrame``."""
    ids = array("I")
    try:
        ids.frombytes(data)
    except ValueError as error:
        raise BadFrame("token ids from the sandbox are not whole numbers of 32 bits") from error
    return tuple(ids)


def _framed(content: Any) -> bytes:
    body = msgpack.packb(content)
    if len(body) > MAX_SANDBOX_MESSAGE_BYTES:
        raise BadFrame(f"a sandbox message has {len(body)} bytes; at most {MAX_SANDBOX_MESSAGE_BYTES} are allowed")
    return HEADER.pack(len(body)) + bytes(body)


def _validated(adapter: TypeAdapter[Any], body: bytes) -> Any:
    try:
        return adapter.validate_python(msgpack.unpackb(body))
    except (ValueError, ValidationError, msgpack.UnpackException, RecursionError) as error:
        raise BadFrame(f"invalid sandbox message: {type(error).__name__}") from error
