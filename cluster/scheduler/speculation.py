"""Decides how many frames of a sequence may be in flight: pure arithmetic on measured times and acceptance.

Without guesses a token takes a whole lap of the ring. With a chain of frames in flight, a right guess takes the time
between two frames, and a wrong one a lap, plus the time for which frames of no use still hold a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.core.frames import StageTiming

SMOOTHING: Final = 0.1
LEAST_FRAMES: Final = 4
"""Frames to measure before the first guess of an epoch."""
GUESS_COST: Final = 0.05
"""The share of a lap that a wrong guess is taken to cost though no frame waits for it: memory bandwidth, the
coordinator's work, and heat."""

LEAST_GAIN: Final = 0.03
"""The share of a lap to gain at least. The acceptance is an estimate, and near the break-even it errs both ways."""


@dataclass(frozen=True, slots=True)
class LapTimes:
    """What a frame of one row takes: ``stages`` to compute, in order, and ``hop`` between two of them, in one unit."""

    stages: tuple[float, ...]
    hop: float = 0.0

    @property
    def lap(self) -> float:
        """The time from sending a frame to its reply, if nothing delays it."""
        return sum(self.stages) + (len(self.stages) + 1) * self.hop

    @property
    def slots(self) -> int:
        """How many frames can be in flight without waiting for each other, at most one for each stage."""
        slowest = max(self.stages)
        return min(len(self.stages), int(self.lap / slowest)) if slowest else len(self.stages)

    def period(self, window: int) -> float:
        """Return the time between two replies of ``window`` frames that follow each other."""
        return max(*self.stages, self.lap / window)

    def residual(self, window: int) -> float:
        """Return how much later a frame comes back that follows a wrong guess.

        ``window`` frames were sent together, and the first reply showed that the others are of no use. The last stage
        skips them. Another stage skips those that wait there once the next certain frame has arrived, but not the one
        that it is computing.
        """
        stale = [self.hop] * (window - 1)  # when each arrives at the present stage
        free, certain = self.hop + self.stages[0], self.lap + self.hop
        for i, seconds in enumerate(self.stages):
            left: list[float] = []
            for arrival in stale if i < len(self.stages) - 1 else ():
                begins = max(arrival, free)
                if begins < certain:
                    free = begins + seconds
                    left.append(free + self.hop)
            certain = max(certain, free) + seconds + self.hop
            following = self.stages[i + 1] if i + 1 < len(self.stages) else 0.0
            head = sum(self.stages[: i + 1]) + (i + 2) * self.hop  # when the first frame arrives at the next stage
            stale, free = left, head + following
        return certain - 2 * self.lap


def mean_token_time(times: LapTimes, window: int, acceptance: float) -> float:
    """Return the expected time of a token with ``window`` frames in flight, where guesses are right that often."""
    if window < 2:
        return times.lap
    miss = times.lap + times.residual(window) + GUESS_COST * times.lap
    return (1 - acceptance) * miss + acceptance * times.period(window)


def choose_window(times: LapTimes, acceptance: float, most: int) -> int:
    """Return how many frames may be in flight, at most ``most``; 1 means no guess, as long as little can be gained.

    More frames than stages never pay: one of no use would hold the first stage when the next certain one comes.
    """
    windows = range(2, min(most, len(times.stages)) + 1)
    best = min(windows, key=lambda window: mean_token_time(times, window, acceptance), default=1)
    return best if mean_token_time(times, best, acceptance) <= (1 - LEAST_GAIN) * times.lap else 1


class LapMeter:
    """Measures the laps of frames of one row in one epoch."""

    def __init__(self, stages: int) -> None:
        self._stages = [0.0] * stages
        self._wire = 0.0
        self._frames = self._laps = 0

    def learn(self, timings: Sequence[StageTiming], lap_s: float | None) -> None:
        """Learn from a frame of one row that every stage computed. ``lap_s`` is None if its lap was not measured."""
        if len(timings) != len(self._stages):
            return
        self._frames += 1
        rate = max(SMOOTHING, 1 / self._frames)
        for timing in timings:
            if timing.stage < len(self._stages):
                self._stages[timing.stage] += rate * (timing.compute_us / 1e6 - self._stages[timing.stage])
        if lap_s is not None:
            self._laps += 1
            wire = max(lap_s - sum(t.compute_us + t.wait_us for t in timings) / 1e6, 0.0)
            self._wire += max(SMOOTHING, 1 / self._laps) * (wire - self._wire)

    @property
    def times(self) -> LapTimes | None:
        """The mean times, in seconds; None until enough frames were measured."""
        if self._laps < LEAST_FRAMES:
            return None
        return LapTimes(tuple(self._stages), self._wire / (len(self._stages) + 1))
