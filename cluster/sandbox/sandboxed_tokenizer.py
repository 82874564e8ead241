"""Provides a model's tokenizer, chat template and grammar compiler at a bounded cost per use.

The cost of a text, a schema or a hostile model is not known in advance, so the work runs in processes that can be
killed. If a job hits a limit, only its request fails, with an error that names the limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import anyio

from cluster.core.errors import BadFrame, InvalidGrammar, InvalidRequest, MacpipeError
from cluster.core.limits import MAX_LISTED_TOKENS, MIB
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Tool, ToolCall, prompt_size, utf8_size
from cluster.sandbox.job_messages import (
    CallsReply,
    CheckGrammar,
    Converse,
    Encode,
    Job,
    Limits,
    OpenModel,
    PromptReply,
    ReadCalls,
    WarmUp,
    unpack_tokens,
)
from cluster.sandbox.limits import (
    LARGE_PROMPT_BYTES,
    SANDBOX_CPU_S,
    SANDBOX_CPU_S_PER_MIB,
    SANDBOX_MEMORY_BYTES,
    SANDBOX_MEMORY_PER_BYTE,
    SANDBOX_MEMORY_PER_TOKEN,
    SANDBOX_OPEN_CPU_S,
    SANDBOX_OPEN_MEMORY_BYTES,
    SANDBOX_OPEN_WALL_S,
    SANDBOX_WALL_FACTOR,
    SANDBOX_WARM_UP_CPU_S,
)
from cluster.sandbox.pool import ProcessPool
from cluster.sandbox.process import SandboxProcess

log = logging.getLogger(__name__)
__all__ = ["SandboxedTokenizer", "TextService", "Tokenized", "convert_reply", "prompt_limits"]

CHECKS_KEPT: Final = 256
"""Number of grammars whose check result is cached."""
OPENING: Final = Limits(SANDBOX_OPEN_CPU_S, SANDBOX_OPEN_MEMORY_BYTES, SANDBOX_OPEN_WALL_S)
WARMING_UP: Final = Limits(SANDBOX_WARM_UP_CPU_S, SANDBOX_MEMORY_BYTES, SANDBOX_OPEN_WALL_S)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt of ``count`` tokens. ``ids`` is empty if ``count`` exceeds the caller's ``max_tokens``.

    ``texts`` has the text of each token if it was requested. ``thinking``: a conversation's answer starts inside the
    reasoning. ``grammar`` is the grammar of the answer, if there is one. ``split_points`` are ascending lengths at
    which later prompts are likely to part from this one, ``borders`` those at which a message, a tool or a
    section begins. ``ignored`` names the options of a conversation that have no effect with
    the model's chat template.
    """

    count: int
    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    thinking: bool = False
    grammar: Grammar | None = None
    split_points: tuple[int, ...] = ()
    borders: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


class TextService(Protocol):
    """The tokenizer operations that requests need. Each method also raises ``Busy`` and ``NotServing``."""

    async def encode(self, text: str, max_tokens: int, *, texts: bool = False, special: bool = True) -> Tokenized:
        """Tokenize ``text``, with special tokens around it unless ``special`` is False. Raises ``InvalidRequest``."""

    async def converse(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        grammar: Grammar | None,
        max_tokens: int,
        *,
        texts: bool = False,
        owner: str = "",
    ) -> Tokenized:
        """Render and tokenize a conversation; ``grammar`` is that of its answer, if any. Raises ``InvalidRequest``.

        What it shares with an earlier one of the same owner need not be tokenized again; "" keeps none.
        """

    async def check_grammar(self, grammar: Grammar) -> None:
        """Raise ``InvalidGrammar`` if the last stage could not enforce ``grammar`` at a bounded cost."""

    async def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        """Return the calls of ``tools`` in a part of an answer; () if one is invalid or parsing takes too long."""

    async def close(self) -> None:
        """Fail all running and waiting jobs with ``NotServing``."""


class SandboxedTokenizer:
    """The ``TextService`` for the model in ``folder``. Uses one event loop.

    Prompts, large prompts and grammars use separate processes, so that neither an expensive schema nor a text of
    megabytes delays other prompts. The processes for large prompts and for grammars start when they are first needed.
    ``split_points``: find those of conversations, which takes a few more renderings of each.
    """

    def __init__(self, folder: Path, *, split_points: bool = False) -> None:
        opening = (OpenModel(str(folder), False, OPENING, split_points), WarmUp(WARMING_UP))
        self._text = ProcessPool(opening)
        self._large = ProcessPool(opening, 1)  # one at a time: each may take gigabytes
        self._grammars = ProcessPool((OpenModel(str(folder), True, OPENING),))
        self._checks: OrderedDict[tuple[GrammarKind, bytes], asyncio.Task[MacpipeError | None]] = OrderedDict()
        """The latest checks by grammar, since requests often use the same grammar, also concurrently."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the ids of the live processes."""
        return self._text.pids + self._large.pids + self._grammars.pids

    async def open(self, process: SandboxProcess | None = None) -> None:
        """Load the tokenizer: in ``process`` if it is given, else in a new process.

        Raises ``BadCheckpoint`` if the tokenizer is unusable or its loading exceeds a limit.
        """
        await self._text.open(process)

    async def encode(self, text: str, max_tokens: int, *, texts: bool = False, special: bool = True) -> Tokenized:
        size = utf8_size(text)
        return await self._prompt(Encode(max_tokens, texts, prompt_limits(size, max_tokens), text, special), size)

    async def converse(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        grammar: Grammar | None,
        max_tokens: int,
        *,
        texts: bool = False,
        owner: str = "",
    ) -> Tokenized:
        size = await anyio.to_thread.run_sync(prompt_size, messages, options.tools)
        job = Converse(max_tokens, texts, prompt_limits(size, max_tokens), tuple(messages), options, grammar, owner)
        return await self._prompt(job, size)

    async def check_grammar(self, grammar: Grammar) -> None:
        key = (grammar.kind, hashlib.sha256(grammar.source.encode()).digest())
        if (check := self._checks.get(key)) is None:
            check = self._checks[key] = asyncio.create_task(self._check(grammar))
            if len(self._checks) > CHECKS_KEPT:
                self._checks.popitem(last=False)
        self._checks.move_to_end(key)
        error = await asyncio.shield(check)
        if isinstance(error, InvalidGrammar):
            raise InvalidGrammar(error.sentence, field=error.field)
        if error:  # a temporary error, not one of the grammar: do not cache it
            self._checks.pop(key, None)
            raise error

    async def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        size = len(body) + sum(len(tool.parameters) for tool in tools)
        try:
            reply = await self._text.run(ReadCalls(body, tuple(tools), prompt_limits(size)))
        except InvalidRequest as error:  # a limit: what no parser can read is content, as an invalid call is
            log.warning("sandbox: tool calls not read reason=%s characters=%d", error.sentence, len(body))
            return ()
        if not isinstance(reply, CallsReply):
            raise BadFrame("the sandbox sent a reply of the wrong type")
        return reply.calls

    async def _check(self, grammar: Grammar) -> MacpipeError | None:
        """Check ``grammar``. Return None, or the error: it cannot be enforced, or the check itself failed."""
        try:
            await self._grammars.run(CheckGrammar(grammar, prompt_limits(0)))
        except MacpipeError as error:
            return error
        return None

    async def close(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._text.close)
            tasks.start_soon(self._large.close)
            tasks.start_soon(self._grammars.close)

    async def _prompt(self, job: Job, size: int) -> Tokenized:
        """Run a job on a prompt of ``size`` bytes."""
        pool = self._large if size > LARGE_PROMPT_BYTES else self._text
        reply = await pool.run(job)
        if not isinstance(reply, PromptReply):
            raise BadFrame("the sandbox sent a reply of the wrong type")
        return convert_reply(reply)


def convert_reply(prompt: PromptReply) -> Tokenized:
    """Convert a reply for callers. Raises ``BadFrame`` if its token ids are invalid."""
    ids = unpack_tokens(prompt.ids)
    return Tokenized(
        prompt.count,
        ids,
        prompt.texts,
        prompt.thinking,
        prompt.grammar,
        prompt.split_points,
        prompt.borders,
        prompt.ignored,
    )


def prompt_limits(size: int, max_tokens: int = 0) -> Limits:
    """Return the limits of a job whose texts have ``size`` bytes together and may have ``max_tokens`` tokens."""
    cpu_s = SANDBOX_CPU_S + SANDBOX_CPU_S_PER_MIB * size / MIB
    tokens = min(size, max(max_tokens, MAX_LISTED_TOKENS) + size // 32)  # what the count by pieces lets pass
    memory = SANDBOX_MEMORY_PER_BYTE * size + SANDBOX_MEMORY_PER_TOKEN * tokens
    return Limits(cpu_s, max(SANDBOX_MEMORY_BYTES, memory), min(cpu_s * SANDBOX_WALL_FACTOR, SANDBOX_OPEN_WALL_S))
