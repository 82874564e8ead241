"""What other threads want of the engine loop's thread, in the order in which they said so."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
Job = Callable[[], None]


class Jobs:
    """Bounded by what feeds it: frames by the ring's window, requests by the open calls."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def put(self, job: Job | None) -> None:
        """Have something done; None: nothing more."""
        self._jobs.put(job)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Have something done, for its answer. Whoever waits for that may have gone by then."""
        future: Future[T] = Future()

        def tell() -> None:
            answer = question()
            if future.set_running_or_notify_cancel():
                future.set_result(answer)

        self.put(tell)
        return future

    def get(self, patience_s: float | None) -> Job | None:
        """The next job. Raises queue.Empty where none comes in time."""
        return self._jobs.get(timeout=patience_s)
