"""Decides how many frames of a sequence may be in flight: pure arithmetic on measured times and acceptance.

``cluster.core.lap_times`` has the time that a token takes. Here it is weighed, and the times are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cluster.core.frames import StageTiming
from cluster.core.lap_times import LapTimes, mean_token_time

SMOOTHING: Final = 0.1
LEAST_FRAMES: Final = 4
"""Frames to measure before the first guess of an epoch."""
GUESS_COST: Final = 0.05
"""The share of a lap that a wrong guess is taken to cost though no frame waits for it: memory bandwidth, the
coordinator's work, and heat."""

LEAST_GAIN: Final = 0.03
"""The share of a lap to gain at least. The acceptance is an estimate, and near the break-even it errs both ways."""


def choose_window(times: LapTimes, acceptance: float, most: int) -> int:
    """Return how many frames may be in flight, at most ``most``; 1 means no guess, as long as little can be gained.

    More frames than stages never pay: one of no use would hold the first stage when the next certain one comes.
    """
    cost = (1 - acceptance) * GUESS_COST * times.lap
    windows = range(2, min(most, len(times.stages)) + 1)
    best = min(windows, key=lambda window: mean_token_time(times, window, acceptance), default=1)
    return best if mean_token_time(times, best, acceptance) + cost <= (1 - LEAST_GAIN) * times.lap else 1


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
