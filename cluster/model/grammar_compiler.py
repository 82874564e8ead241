"""Compiles grammars on the last stage, on threads other than the compute thread.

Compilation starts when a sequence joins. At the sequence's first token the compute thread waits for it, for a bounded
time. If a grammar fails or is late, only its sequence fails.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from llguidance import LLMatcher

from cluster.core.errors import InvalidGrammar
from cluster.core.limits import GRAMMAR_WAIT_S, MAX_STAGE_COMPILES
from cluster.core.request import Grammar, GrammarKind
from cluster.model.grammars import Constraint, Grammars

__all__ = ["GrammarCompiler"]

THREADS: Final = 2
"""Two threads, so that a large grammar hardly delays a small one; llguidance releases the GIL."""
COMPILED_KEPT: Final = 16
"""Compiled grammars to keep: many requests share a grammar, and all samples of one prompt do."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer, which ``make`` loads on a compiler thread. Thread-safe."""

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammars")
        self._grammars = self._pool.submit(make)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[GrammarKind, str], Future[LLMatcher]] = OrderedDict()

    def begin(self, grammar: Grammar) -> None:
        """Start to compile ``grammar``, unless it is compiled or being compiled. Does not block and never raises."""
        self._future(grammar)

    def constraint(self, grammar: Grammar, start: int) -> Constraint:
        """Return the constraint of a sequence whose answer starts at token ``start``. Blocks until it is compiled.

        Raises InvalidGrammar if ``grammar`` does not compile, not within ``GRAMMAR_WAIT_S``, or if too many others
        wait. Raises BadCheckpoint if the tokenizer cannot be loaded.
        """
        compiled = self._future(grammar)
        if compiled is None:
            raise InvalidGrammar(f"{MAX_STAGE_COMPILES} other grammars are waiting to be compiled; try again later")
        try:
            matcher = compiled.result(GRAMMAR_WAIT_S)
        except TimeoutError:
            raise InvalidGrammar(
                f"the {grammar.kind.value} was not compiled within {GRAMMAR_WAIT_S:.0f} s on the last stage; "
                "make it simpler, or try again when the machine has less to do"
            ) from None
        return Constraint(matcher.deep_copy(), self._grammars.result().eos, start, grammar)

    def close(self) -> None:
        """Cancel waiting compilations. Those that run finish by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _future(self, grammar: Grammar) -> Future[LLMatcher] | None:
        """Return the future of ``grammar``, new or known; None if too many compilations are unfinished."""
        key = (grammar.kind, grammar.source)
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                if sum(not one.done() for one in self._compiled.values()) >= MAX_STAGE_COMPILES:
                    return None
                found = self._compiled[key] = self._pool.submit(self._compile, grammar)
            self._compiled.move_to_end(key)
            self._forget_oldest()
            return found

    def _compile(self, grammar: Grammar) -> LLMatcher:
        return self._grammars.result().compile(grammar)

    def _forget_oldest(self) -> None:
        """Drop the oldest finished grammars beyond ``COMPILED_KEPT``. Keep unfinished ones: sequences wait for them."""
        finished = [key for key, one in self._compiled.items() if one.done()]
        for key in finished[: max(0, len(finished) - COMPILED_KEPT)]:
            del self._compiled[key]
