"""Decides how many frames of a sequence may be in flight: pure arithmetic on measured times and acceptance.

``cluster.core.lap_times`` has the time that a token takes. Here it is weighed, and the times are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class _StageMeans:
    """The mean seconds that frames of one kind take on each stage; recent ones weigh more."""

    def __init__(self, stages: int) -> None:
        self.seconds = [0.0] * stages
        self.frames = 0

    def learn(self, timings: Sequence[StageTiming]) -> None:
        self.frames += 1
        rate = max(SMOOTHING, 1 / self.frames)
        for timing in timings:
            if timing.stage < len(self.seconds):
                self.seconds[timing.stage] += rate * (timing.compute_us / 1e6 - self.seconds[timing.stage])


class LapMeter:
    """Measures the laps of frames of one sequence in one epoch.

    ``costs`` has, for each number of tokens that a frame may verify, how often it is expected to take each stage's time
    of one token.
    """

    def __init__(self, stages: int, costs: Mapping[int, Sequence[float]]) -> None:
        self._costs = costs
        self._stages = {tokens: _StageMeans(stages) for tokens in (1, *costs)}
        self._count = stages
        self._wire = 0.0
        self._laps = 0

    def learn(self, timings: Sequence[StageTiming], lap_s: float | None, tokens: int = 1) -> None:
        """Learn from a frame of ``tokens`` tokens that every stage computed. ``lap_s`` is None if it is not known."""
        if len(timings) != self._count:
            return
        self._stages[tokens].learn(timings)
        if lap_s is not None:
            self._laps += 1
            wire = max(lap_s - sum(t.compute_us + t.wait_us for t in timings) / 1e6, 0.0)
            self._wire += max(SMOOTHING, 1 / self._laps) * (wire - self._wire)

    @property
    def times(self) -> LapTimes | None:
        """The mean times of frames of one token, in seconds; None until enough frames were measured."""
        if self._laps < LEAST_FRAMES:
            return None
        return LapTimes(tuple(self._stages[1].seconds), self._wire / (self._count + 1))

    def steps(self) -> dict[int, LapTimes]:
        """Return the times of frames by their tokens, measured or expected; empty until enough were measured."""
        one = self.times
        return {} if one is None else {1: one} | {tokens: self._times_of(tokens, one) for tokens in self._costs}

    def _times_of(self, tokens: int, one: LapTimes) -> LapTimes:
        measured = self._stages[tokens]
        if measured.frames >= LEAST_FRAMES:
            return LapTimes(tuple(measured.seconds), one.hop)
        return LapTimes(tuple(c * s for c, s in zip(self._costs[tokens], one.stages, strict=True)), one.hop)
