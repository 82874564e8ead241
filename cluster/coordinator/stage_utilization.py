"""Measure how busy each stage is: its recent compute time as a share of the time with a frame in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cluster.core.frames import StageTiming
from cluster.core.limits import OCCUPANCY_S


class StageUtilization:
    """Sums the frames that come back. Arguments are times of the engine loop's clock, in seconds."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._frames: deque[tuple[float, float, tuple[int, ...]]] = deque()
        self._last = 0.0
        self._active_s = 0.0
        self._busy_s = [0.0] * stages

    @property
    def active_s(self) -> float:
        """Seconds with a frame in flight, since the epoch began."""
        return self._active_s

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Compute time of each stage in seconds, since the epoch began."""
        return tuple(self._busy_s)

    def frame(self, sent_at: float, now: float, timings: Sequence[StageTiming]) -> None:
        """Add a frame that came back. The ring was active since its send, or since the previous frame's return."""
        active = now - max(sent_at, self._last)
        self._last = now
        self._active_s += active
        compute = [0] * self._stages
        for timing in timings:
            if timing.stage < self._stages:
                compute[timing.stage] = timing.compute_us
                self._busy_s[timing.stage] += timing.compute_us / 1e6
        self._frames.append((now, active, tuple(compute)))
        self._forget(now)

    def bubbles(self, now: float) -> tuple[float | None, ...]:
        """Return each stage's idle share of the active time in the last ``OCCUPANCY_S``; None if no frame came back."""
        self._forget(now)
        active = sum(f[1] for f in self._frames)
        if active <= 0:
            return (None,) * self._stages
        busy = [sum(f[2][i] for f in self._frames) / 1e6 for i in range(self._stages)]
        return tuple(max(0.0, 1.0 - b / active) for b in busy)

    def _forget(self, now: float) -> None:
        while self._frames and self._frames[0][0] < now - OCCUPANCY_S:
            self._frames.popleft()
