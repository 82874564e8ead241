"""Whether a grammar can be enforced, found out before its request is accepted: off the event loop, in bounded time."""

from __future__ import annotations

import anyio

from cluster.coordinator.checkpoint import Checkpoint
from cluster.errors import InvalidGrammar
from cluster.grammar import Grammar
from cluster.limits import COMPILE_TIMEOUT_S, MAX_COMPILES


class GrammarCheck:
    """``max_bytes`` bounds a grammar's source. At most ``MAX_COMPILES`` are compiled at once; the others wait."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._threads: anyio.CapacityLimiter | None = None

    async def check(self, grammar: Grammar, checkpoint: Checkpoint) -> None:
        """Raises ``InvalidGrammar``: too long, impossible to compile (with the reason), or too slow at it."""
        size = len(grammar.source.encode())
        if size > self._max_bytes:
            raise InvalidGrammar(
                f"the {grammar.kind.value} has {size} bytes; at most {self._max_bytes} are taken (--max-schema-bytes)",
                field=grammar.kind.value,
            )
        if self._threads is None:  # not before: a limiter belongs to the loop that runs while it is made
            self._threads = anyio.CapacityLimiter(MAX_COMPILES)
        with anyio.move_on_after(COMPILE_TIMEOUT_S):
            await anyio.to_thread.run_sync(
                checkpoint.tokenizer.check_grammar, grammar, abandon_on_cancel=True, limiter=self._threads
            )
            return
        raise InvalidGrammar(
            f"the {grammar.kind.value} could not be compiled within {COMPILE_TIMEOUT_S:.0f} s; make it simpler",
            field=grammar.kind.value,
        )
