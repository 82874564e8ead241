"""Count how often workers lose a slice: the engine of one among several models may crash as soon as it is loaded again.

Its daemon is fine then, and so are its other engines, so that nobody else notices.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from cluster.core.limits import CRASHES_S, ENGINE_BACKOFF_S, ENGINE_CRASHES


class SliceLosses:
    """The losses of one service in the last ``CRASHES_S``, by the workers' names."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lost_at: dict[str, deque[float]] = {}

    def add(self, worker: str) -> None:
        """Count a loss."""
        self._drop_old()
        self._lost_at.setdefault(worker, deque(maxlen=len(ENGINE_BACKOFF_S))).append(self._clock())

    def crashing(self) -> frozenset[str]:
        """Return the workers that had ``ENGINE_CRASHES`` losses: others get their layers, if there are any."""
        self._drop_old()
        return frozenset(worker for worker, times in self._lost_at.items() if len(times) >= ENGINE_CRASHES)

    def pause_s(self, worker: str) -> float:
        """Return for how many seconds nothing is to be loaded there, as the pauses of an engine that keeps dying."""
        times = self._lost_at.get(worker)
        if not times:
            return 0.0
        pause_s = ENGINE_BACKOFF_S[min(len(times), len(ENGINE_BACKOFF_S)) - 1]
        return max(times[-1] + pause_s - self._clock(), 0.0)

    def _drop_old(self) -> None:
        since = self._clock() - CRASHES_S
        recent = {worker: [at for at in times if at > since] for worker, times in self._lost_at.items()}
        self._lost_at = {w: deque(times, maxlen=len(ENGINE_BACKOFF_S)) for w, times in recent.items() if times}
