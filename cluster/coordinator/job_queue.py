"""What other threads want of the engine loop's thread, in the order in which they said so."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from cluster.core.errors import NotServing

T = TypeVar("T")
Job = Callable[[], None]


class JobQueue:
    """Bounded by what feeds it: frames by the ring's window, requests by the open calls."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False

    def put(self, job: Job) -> bool:
        """Have something done; False after ``close``, when nobody would do it."""
        with self._closing:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def close(self) -> None:
        """Take no more jobs; ``get`` returns None after those that were taken."""
        with self._closing:
            self._closed = True
            self._jobs.put(None)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Have something done, for its answer: ``NotServing`` after ``close``. Whoever waits may have gone by then."""
        future: Future[T] = Future()

        def tell() -> None:
            answer = question()
            if future.set_running_or_notify_cancel():
                future.set_result(answer)

        if not self.put(tell):
            future.set_exception(NotServing("the model is not served any more; ask again once another is"))
        return future

    def get(self, patience_s: float | None) -> Job | None:
        """The next job; None once closed. Raises queue.Empty where none comes in time."""
        return self._jobs.get(timeout=patience_s)
