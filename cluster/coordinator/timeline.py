"""Remember the last loads, recoveries, moves and returns of a cluster, for those who look at it later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cluster.core.cluster_state import ClusterEvent, EventKind
from cluster.core.limits import MAX_SENTENCE_CHARS

MAX_EVENTS: Final = 50
"""Older events are forgotten."""


@dataclass(frozen=True, slots=True)
class _Ended:
    kind: EventKind
    at: float
    duration_s: float
    worker: str
    sentence: str


class Timeline:
    """The last ``MAX_EVENTS`` events. All methods must be called on one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: deque[_Ended] = deque(maxlen=MAX_EVENTS)
        self.recoveries = 0
        """How many there were, those included that are forgotten."""
        self._returned: dict[str, float] = {}
        """When each worker was lost from which it has come back."""

    def add(self, kind: EventKind, sentence: str, worker: str = "", began: float | None = None) -> None:
        """Add an event that has just ended. ``began`` is a time of the clock; None for a moment."""
        now = self._clock()
        self.recoveries += kind is EventKind.RECOVERY
        duration_s = 0.0 if began is None else now - began
        self._events.append(_Ended(kind, now, duration_s, worker, sentence[:MAX_SENTENCE_CHARS]))

    def add_return(self, worker: str, lost_at: float) -> str:
        """Add that a lost worker is back, and return it as a sentence; "" if that was added before.

        A short silence later does not make it lost again.
        """
        if self._returned.get(worker) == lost_at:
            return ""
        self._returned[worker] = lost_at
        sentence = f"worker {worker} is back after {self._clock() - lost_at:.0f} s"
        self.add(EventKind.RETURN, sentence, worker, lost_at)
        return sentence

    def describe(self) -> tuple[ClusterEvent, ...]:
        """Return the events, oldest first."""
        now = self._clock()
        return tuple(ClusterEvent(e.kind, now - e.at, e.duration_s, e.worker, e.sentence) for e in self._events)
