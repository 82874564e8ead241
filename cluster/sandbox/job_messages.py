"""Encodes jobs and replies between a sandbox process and its parent: msgpack with a length prefix.

A hostile model may corrupt the child, which may then send anything. So every message is bounded and validated.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from cluster.core.errors import BadFrame, Reason
from cluster.core.limits import MAX_BORDERS, MAX_LISTED_TOKENS, MAX_READ_CALLS, MAX_SPLIT_POINTS
from cluster.core.request import ChatMessage, ChatOptions, Grammar, Tool, ToolCall
from cluster.sandbox.limits import MAX_SANDBOX_MESSAGE_BYTES

__all__ = [
    "CallsReply",
    "CheckGrammar",
    "Converse",
    "Encode",
    "Job",
    "JobFailed",
    "Limits",
    "OpenModel",
    "PromptReply",
    "ReadCalls",
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
ShortWord: TypeAlias = Annotated[str, Field(max_length=64)]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one job: CPU seconds, bytes of memory beyond those that the process holds, and wall-clock seconds."""

    cpu_s: float
    memory_bytes: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Load the tokenizer in ``folder``; always the first job. ``grammars``: also prepare it to compile grammars.

    ``split_points``: return the split points of conversations.
    """

    folder: str
    grammars: bool
    limits: Limits
    split_points: bool = False
    kind: Literal["open"] = "open"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Compile the chat template by rendering a message; it does not matter whether the template accepts it."""

    limits: Limits
    kind: Literal["warm_up"] = "warm_up"


@dataclass(frozen=True, slots=True)
class PromptJob:
    """A job whose reply is a prompt: at most ``max_tokens`` ids; ``texts`` asks for the text of each token too.

    A long prompt that certainly has more than ``max_tokens`` and ``MAX_LISTED_TOKENS`` is not tokenized whole.
    """

    max_tokens: int
    texts: bool
    limits: Limits

    @property
    def most(self) -> int:
        """Return the number of tokens beyond which the prompt need not be counted."""
        return max(self.max_tokens, MAX_LISTED_TOKENS)


@dataclass(frozen=True, slots=True)
class Encode(PromptJob):
    """Tokenize ``text``, with the tokenizer's special tokens around it if ``special``."""

    text: str
    special: bool = True
    kind: Literal["encode"] = "encode"


@dataclass(frozen=True, slots=True)
class Converse(PromptJob):
    """Render a conversation with the chat template and tokenize it.

    The process keeps it for later ones of the same ``owner``, unless that is empty.
    """

    messages: tuple[ChatMessage, ...]
    options: ChatOptions
    grammar: Grammar | None
    owner: str = ""
    kind: Literal["converse"] = "converse"


@dataclass(frozen=True, slots=True)
class CheckGrammar:
    """Compile ``grammar`` and follow it for some tokens, as the last stage will."""

    grammar: Grammar
    limits: Limits
    kind: Literal["grammar"] = "grammar"


@dataclass(frozen=True, slots=True)
class ReadCalls:
    """Read the calls of ``tools`` in ``body``, a part of an answer."""

    body: str
    tools: tuple[Tool, ...]
    limits: Limits
    kind: Literal["calls"] = "calls"


@dataclass(frozen=True, slots=True)
class Ready:
    """The job is done and returns nothing."""

    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True)
class PromptReply:
    """A tokenized prompt of ``count`` tokens. ``ids`` is empty if ``count`` exceeds the job's ``max_tokens``.

    ``ids`` are uint32 in native byte order. The other fields are set for conversations only: ``split_points`` are
    lengths at which later prompts are likely to part from this one, ``borders`` are those at which a message, a
    tool or a section begins, ``ignored`` names the options that the chat template does not
    know.
    """

    count: int
    ids: bytes
    texts: tuple[str, ...] = ()
    thinking: bool = False
    grammar: Grammar | None = None
    split_points: Annotated[tuple[int, ...], Field(max_length=MAX_SPLIT_POINTS)] = ()
    borders: Annotated[tuple[int, ...], Field(max_length=MAX_BORDERS)] = ()
    ignored: Annotated[tuple[ShortWord, ...], Field(max_length=8)] = ()
    kind: Literal["prompt"] = "prompt"


@dataclass(frozen=True, slots=True)
class CallsReply:
    """The calls that were read; none if any of them was invalid."""

    calls: Annotated[tuple[ToolCall, ...], Field(max_length=MAX_READ_CALLS)]
    kind: Literal["called"] = "called"


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job failed with the ``MacpipeError`` of that ``reason``, ``sentence``, ``field`` and ``details``."""

    reason: Reason
    sentence: str
    field: str
    details: Annotated[dict[ShortWord, ShortWord], Field(max_length=8)] = dataclass_field(default_factory=dict)
    kind: Literal["failed"] = "failed"


Job = OpenModel | WarmUp | Encode | Converse | CheckGrammar | ReadCalls
Reply = Ready | PromptReply | CallsReply | JobFailed
_JOBS: Final[TypeAdapter[Job]] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])
_REPLIES: Final[TypeAdapter[Reply]] = TypeAdapter(Annotated[Reply, Field(discriminator="kind")])


def pack_job(job: Job) -> bytes:
    """Serialize ``job`` with its length prefix. Raises ``BadFrame`` if it is too large."""
    return _add_length(_JOBS.dump_python(job))


def pack_reply(reply: Reply) -> bytes:
    """Serialize ``reply`` with its length prefix. Raises ``BadFrame`` if it is too large."""
    return _add_length(_REPLIES.dump_python(reply))


def unpack_job(body: bytes) -> Job:
    """Parse a job. Raises ``BadFrame``."""
    job: Job = _parse(_JOBS, body)
    return job


def unpack_reply(body: bytes) -> Reply:
    """Parse a reply. Raises ``BadFrame``."""
    reply: Reply = _parse(_REPLIES, body)
    return reply


def payload_size(header: bytes) -> int:
    """Return the length in bytes of the message after ``header``. Raises ``BadFrame`` if it is too large."""
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
        raise BadFrame(f"token ids from the sandbox have {len(data)} bytes, which is not a multiple of 4") from error
    return tuple(ids)


def _add_length(content: Any) -> bytes:
    body = msgpack.packb(content)
    if len(body) > MAX_SANDBOX_MESSAGE_BYTES:
        raise BadFrame(f"a sandbox message has {len(body)} bytes; at most {MAX_SANDBOX_MESSAGE_BYTES} are allowed")
    return HEADER.pack(len(body)) + bytes(body)


def _parse(adapter: TypeAdapter[Any], body: bytes) -> Any:
    try:
        return adapter.validate_python(msgpack.unpackb(body))
    except (ValueError, ValidationError, msgpack.UnpackException, RecursionError) as error:
        raise BadFrame(f"invalid sandbox message: {type(error).__name__}") from error
