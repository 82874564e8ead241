"""Compiling grammars on the last stage, off the thread that computes.

Compiling begins when a sequence joins. The compute thread waits for it at the sequence's first token, for a bounded
time; a grammar that fails or is late fails its own sequence.
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
"""A large grammar delays another one little; llguidance does not hold the interpreter's lock."""
COMPILED_KEPT: Final = 16
"""Compiled grammars kept: many requests bring the same one, and the samples of a prompt always do."""


class GrammarCompiler:
    """Compiles for one tokenizer, which ``make`` loads on a thread of the compiler. Its methods may be called by any
    thread.
    """

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammars")
        self._grammars = self._pool.submit(make)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[GrammarKind, str], Future[LLMatcher]] = OrderedDict()

    def begin(self, grammar: Grammar) -> None:
        """Start to compile ``grammar``, unless it is compiled or under way. Returns at once and raises nothing."""
        self._future(grammar)

    def constraint(self, grammar: Grammar, start: int) -> Constraint:
        """Bind a sequence whose answer begins at token ``start``. Waits until ``grammar`` is compiled.

        Raises InvalidGrammar: it cannot be compiled, not within ``GRAMMAR_WAIT_S``, or too many others wait. Raises
        BadCheckpoint for a tokenizer that cannot be loaded.
        """
        compiled = self._future(grammar)
        if compiled is None:
            raise InvalidGrammar(f"{MAX_STAGE_COMPILES} other grammars wait to be compiled; try again in a moment")
        try:
            matcher = compiled.result(GRAMMAR_WAIT_S)
        except TimeoutError:
            raise InvalidGrammar(
                f"the {grammar.kind.value} was not compiled within {GRAMMAR_WAIT_S:.0f} s on the last stage; "
                "make it simpler, or try again when the machine has less to do"
            ) from None
        return Constraint(matcher.deep_copy(), self._grammars.result().eos, start, grammar)

    def close(self) -> None:
        """Compile nothing more. What is under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _future(self, grammar: Grammar) -> Future[LLMatcher] | None:
        """The compiled ``grammar`` or the one under way; None where too many are."""
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
        """Drop finished grammars beyond those kept. Those under way stay: their sequences wait for them."""
        finished = [key for key, one in self._compiled.items() if one.done()]
        for key in finished[: max(0, len(finished) - COMPILED_KEPT)]:
            del self._compiled[key]
