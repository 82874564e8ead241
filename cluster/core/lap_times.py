"""The time of a token whose frames pass one stage after the other, with or without guesses: pure arithmetic.

Without guesses a token takes a whole lap of the ring. With several frames of a sequence in flight, a right guess takes
the time between two frames, and a wrong one a lap, plus the time for which frames of no use still hold a stage. The
last stage skips those at once, but another stage finishes the one that it computes. So a slow last stage costs little
and a slow first stage costs much.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

SLOT_SLACK: Final = 1.05
"""Stages whose measured times differ by this ratio count as equal, so that noise takes no frame from users."""


@dataclass(frozen=True, slots=True)
class LapTimes:
    """What a frame takes: ``stages`` to compute, in order, and ``hop`` between two of them, in one unit."""

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
        return min(len(self.stages), int(SLOT_SLACK * self.lap / slowest)) if slowest else len(self.stages)

    def period(self, window: int) -> float:
        """Return the time between two replies of ``window`` frames that follow each other."""
        return max(*self.stages, self.lap / window)

    def residual(self, window: int) -> float:
        """Return how much later a frame comes back that follows a wrong guess.

        ``window`` frames were sent together, and the first reply showed that the others are of no use. The last stage
        skips them. Another stage skips those that wait there once the next certain frame has arrived, but not the one
        that it is computing.
        """
        if self.lap == inf:
            return 0.0
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


def run_token_time(first: float, period: float, acceptance: float, tokens: int = 1) -> float:
    """Return the expected time of a token in runs of frames that each verify ``tokens`` tokens.

    A run ends with a wrong guess. Its first frame takes ``first``, and each later one, whose guesses all follow right
    ones, ``period``. ``acceptance`` is the probability that a guess is right.
    """
    if acceptance >= 1:
        return period / tokens
    if not acceptance:
        return first
    whole = acceptance**tokens
    return (1 - acceptance) * (first + period * whole / (1 - whole))


def mean_token_time(times: LapTimes, window: int, acceptance: float, tokens: int = 1) -> float:
    """Return the expected time of a token with ``window`` frames in flight, where guesses are right that often.

    ``times`` are those of a frame of ``tokens`` tokens. One frame of one token means no guess.
    """
    if window < 2 and tokens < 2:
        return times.lap
    return run_token_time(times.lap + times.residual(window), times.period(window), acceptance, tokens)
