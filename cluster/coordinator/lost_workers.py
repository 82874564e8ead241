"""Remember the workers that were lost with the leader before this one, until they answer.

A new leader knows them by what that one told it. It refuses to know whether they are still wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["KnownWorker", "LostWorkers"]


@dataclass(frozen=True, slots=True)
class KnownWorker:
    """A worker as a leader tells its successor of it."""

    id: str
    name: str
    address: str


class LostWorkers:
    """The workers of the leader before that have not answered since. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._missed: dict[str, KnownWorker] = {}
        self.since = clock()
        """When it was found that they do not answer."""

    def miss(self, workers: Iterable[KnownWorker]) -> None:
        """Miss these workers from now on."""
        self._missed = {worker.id: worker for worker in workers}
        self.since = self._clock()

    def hear(self, worker_id: str) -> None:
        """Miss the worker with this id no more, wherever it answers."""
        self._missed.pop(worker_id, None)

    def all(self) -> tuple[KnownWorker, ...]:
        """Return the workers that are missed, sorted by name."""
        return tuple(sorted(self._missed.values(), key=lambda one: (one.name, one.id)))
