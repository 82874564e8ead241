"""Queue jobs from other threads for the engine loop's thread, in order of arrival."""

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
    """A thread-safe job queue. Its producers bound its size: the ring's window bounds frames, open calls requests."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False

    def put(self, job: Job) -> bool:
        """Queue a job. Return False after ``close``."""
        with self._closing:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def close(self) -> None:
        """Accept no more jobs. ``get`` returns the jobs accepted before, then None."""
        with self._closing:
            self._closed = True
            self._jobs.put(None)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Queue a call and return a future of its result. The caller may cancel the future.

        After ``close``, the future fails with ``NotServing``. An error of the call goes to the future, too.
        """
        future: Future[T] = Future()

        def answer_question() -> None:
            try:
                answer = question()
            except Exception as e:
                if future.set_running_or_notify_cancel():
                    future.set_exception(e)
                raise
            if future.set_running_or_notify_cancel():
                future.set_result(answer)

        if not self.put(answer_question):
            future.set_exception(NotServing("the model is no longer served; try again once a model is loaded"))
        return future

    def get(self, wait_s: float | None) -> Job | None:
        """Return the next job; None once closed. Raises ``queue.Empty`` after ``wait_s``; None waits for ever."""
        return self._jobs.get(timeout=wait_s)
