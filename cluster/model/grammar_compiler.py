"""Compiles grammars on the last stage, on threads other than the compute thread.

Compilation starts when a sequence joins. Nobody waits for it: a sequence whose grammar is not compiled at its first
token gets its sample later (``Stage``). Compiled grammars are kept for later requests, as long as they are used and
within a budget of bytes; those of live sequences live as long as these.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final
from weakref import ReferenceType, WeakValueDictionary, ref

from llguidance import LLMatcher

from cluster.core.errors import InvalidGrammar, MacpipeError
from cluster.core.limits import (
    COMPILED_BYTES,
    COMPILED_LIVE_BYTES,
    KIB,
    MAX_STAGE_COMPILES,
    MIB,
)
from cluster.core.request import Grammar, GrammarKind
from cluster.model.grammars import Constraint, Grammars

__all__ = ["Compilation", "GrammarCompiler"]

log = logging.getLogger(__name__)

THREADS: Final = 2
"""Two threads, so that a large grammar hardly delays a small one; llguidance releases the GIL."""
COMPILED_BYTES_PER_S: Final = 256 * MIB
"""What a grammar weighs for each second of CPU time that it took to compile. JSON schemas that were tried took up to
204 MiB, usually below 100; Lark's substrings up to 305."""
COMPILED_KEPT: Final = 64
"""Compiled grammars that a stage keeps, counted: small ones weigh too little to tell."""
COMPILED_IDLE_S: Final = 300.0
"""A compiled grammar that nobody has asked for during this time is dropped."""
MASK_GROWTH_BYTES: Final = 4 * KIB
"""What one mask may add to the automaton of a compiled grammar; the worst of those that were tried added 4.3 KiB."""
Key = tuple[GrammarKind, str]


class Compilation:
    """The compilation of one grammar. The sequences that use the grammar share it and keep it alive.

    ``masks`` counts the masks computed from it: they fill the automaton that all its matchers share.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.key: Final = (grammar.kind, grammar.source)
        self.grammar: Final = grammar
        self.masks = 0
        self._future: Future[tuple[LLMatcher, tuple[int, ...]]] = Future()
        self._cpu_s = 0.0

    @property
    def done(self) -> bool:
        """Return whether it has ended, well or not."""
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Return whether it has ended without a result."""
        return self.done and self._future.exception() is not None

    @property
    def nbytes(self) -> int:
        """Return the estimated memory of the compiled grammar, in bytes.

        The library does not tell. To measure the heap takes 60 ms once it is fragmented, and holds the allocator's
        locks. So it is a bound by the work: the CPU time of the compilation, and the masks computed since.
        """
        return int(self._cpu_s * COMPILED_BYTES_PER_S) + self.masks * MASK_GROWTH_BYTES

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended, for at most ``timeout_s``. Return whether it has."""
        try:
            self._future.exception(timeout_s)
        except TimeoutError:
            return False
        return True

    def constraint(self, grammar: Grammar, start: int) -> Constraint:
        """Return the constraint of a sequence whose answer starts at token ``start``. Does not block.

        ``grammar`` has the source that was compiled. Raises InvalidGrammar if it does not compile or is not compiled
        yet, BadCheckpoint if the tokenizer cannot be loaded.
        """
        if not self.done:
            raise InvalidGrammar(f"the {grammar.kind.value} has not been compiled yet")
        matcher, eos = self._future.result()
        return Constraint(matcher.deep_copy(), eos, start, grammar)

    def finish(self, matcher: LLMatcher, eos: tuple[int, ...], cpu_s: float) -> None:
        """Set the result and the CPU time that it took, in seconds."""
        self._cpu_s = cpu_s
        self._future.set_result((matcher, eos))

    def fail(self, error: MacpipeError) -> None:
        """Set the reason why there is no result."""
        self._future.set_exception(error)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, which ``make`` loads on a compiler thread. Thread-safe."""

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self._pool = ThreadPoolExecutor(THREADS + 1, thread_name_prefix="grammars")  # one loads the tokenizer
        self._grammars = self._pool.submit(make)
        self._lock = threading.Lock()
        self._known: WeakValueDictionary[Key, Compilation] = WeakValueDictionary()
        self._waiting: deque[ReferenceType[Compilation]] = deque()
        self._working = 0
        self._kept: OrderedDict[Key, tuple[Compilation, float]] = OrderedDict()
        """Compiled grammars and when each was last asked for, which is their order."""
        self._timer: threading.Timer | None = None
        self._closed = False

    def begin(self, grammar: Grammar) -> Compilation | None:
        """Return the compilation of ``grammar``, new or known. Does not block and never raises.

        Return None if ``MAX_STAGE_COMPILES`` others have not ended: ask again later. Ask again as well until the
        compilation has ended, since it may wait for memory. One that nobody holds any more when its turn comes is
        skipped.
        """
        key = (grammar.kind, grammar.source)
        with self._lock:
            found = self._known.get(key)
            if found is None:
                if sum(not one.done for one in self._known.values()) >= MAX_STAGE_COMPILES or self._closed:
                    return None
                found = self._known[key] = Compilation(grammar)
                self._enqueue(found)
            elif key in self._kept:
                self._kept[key] = found, time.monotonic()
                self._kept.move_to_end(key)
            self._start_work()
            return found

    def close(self) -> None:
        """Cancel waiting compilations and forget the others. Those that run finish by themselves."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._kept.clear()
            if self._timer:
                self._timer.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, compilation: Compilation) -> None:
        """Queue a compilation. Drop those that nobody holds, so the queue is as bounded as the living ones are."""
        self._waiting = deque(one for one in self._waiting if one() is not None)
        self._waiting.append(ref(compilation))

    def _start_work(self) -> None:
        """Have one more thread work if there is anything to do for it."""
        if self._waiting and self._working < THREADS and self._has_room() and not self._closed:
            self._working += 1
            self._pool.submit(self._work)

    def _has_room(self) -> bool:
        """Return whether what is compiled, kept or of live rows, leaves memory for another one."""
        return sum(one.nbytes for one in self._known.values() if one.done) <= COMPILED_LIVE_BYTES

    def _work(self) -> None:
        while compilation := self._next():
            self._compile(compilation)
            _release(self._keep(compilation))
            del compilation  # otherwise it lives until the next one is taken

    def _next(self) -> Compilation | None:
        with self._lock:
            while self._waiting and self._has_room():
                if compilation := self._waiting.popleft()():
                    return compilation
            self._working -= 1
            return None

    def _compile(self, compilation: Compilation) -> None:
        try:
            grammars = self._grammars.result()
            began = time.thread_time()
            matcher = grammars.compile(compilation.grammar)
        except MacpipeError as error:
            compilation.fail(error)
        except BaseException as error:  # a panic of the library is no Exception; it concerns this grammar alone
            log.exception("grammar compiler: compilation failed")
            compilation.fail(InvalidGrammar(f"the grammar compiler failed: {type(error).__name__}"))
        else:
            compilation.finish(matcher, grammars.eos, time.thread_time() - began)

    def _keep(self, compilation: Compilation) -> list[Compilation]:
        """Keep a compiled grammar for later requests. Return those that are dropped for it."""
        if compilation.failed:
            return []
        with self._lock:
            if self._closed:
                return []
            self._kept[compilation.key] = compilation, time.monotonic()
            self._start_timer()
            return self._take_excess()

    def _take_excess(self) -> list[Compilation]:
        """Remove and return the least recently used grammars, until the rest is within the budget."""
        taken: list[Compilation] = []
        total = sum(one.nbytes for one, _ in self._kept.values())
        while total > COMPILED_BYTES or len(self._kept) > COMPILED_KEPT:
            _, (oldest, _) = self._kept.popitem(last=False)
            total -= oldest.nbytes
            taken.append(oldest)
        return taken

    def _start_timer(self) -> None:
        if self._timer is None and self._kept and not self._closed:
            _, used_at = next(iter(self._kept.values()))
            self._timer = threading.Timer(max(used_at + COMPILED_IDLE_S - time.monotonic(), 0.0), self._drop_idle)
            self._timer.daemon = True
            self._timer.start()

    def _drop_idle(self) -> None:
        """Drop the grammars that nobody has asked for during ``COMPILED_IDLE_S``, and come back for the next one."""
        with self._lock:
            self._timer = None
            dropped = self._take_excess() + self._take_idle()
            self._start_timer()
        _release(dropped)

    def _take_idle(self) -> list[Compilation]:
        before = time.monotonic() - COMPILED_IDLE_S
        return [self._kept.pop(key)[0] for key, (_, used_at) in [*self._kept.items()] if used_at <= before]


def _release(dropped: list[Compilation]) -> None:
    """Free grammars one by one: Python's lock is held while one is freed, 25 ms for 40 MiB."""
    while dropped:
        dropped.pop()
