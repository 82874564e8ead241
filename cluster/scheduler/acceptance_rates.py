"""Estimates how often the next guess of a source is right, for one sequence and for all before it."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Final

from cluster.scheduler.guessing import GuessSource

UNKNOWN: Final = 0.5
"""What a source is taken to reach before anything is known of it."""
PRIOR_WEIGHT: Final = 2.0
"""Guesses of a sequence that weigh as much as what is known of its source."""
OWN_DECAY: Final = 31 / 32
SOURCE_DECAY: Final = 255 / 256


@dataclass(slots=True)
class RightShare:
    """``right`` of ``total`` guesses. Older ones, and what was assumed at first, count less and less."""

    right: float
    total: float = PRIOR_WEIGHT

    @classmethod
    def assumed(cls, share: float) -> RightShare:
        return cls(share * PRIOR_WEIGHT)

    def add(self, right: bool, decay: float) -> None:
        self.right = decay * self.right + right
        self.total = decay * self.total + 1

    @property
    def mean(self) -> float:
        return self.right / self.total

    @property
    def cautious(self) -> float:
        """The mean less its standard error, so that few guesses do not pass for good ones by luck."""
        return max(0.0, self.mean - sqrt(self.mean * max(0.0, 1 - self.mean) / self.total))


class AcceptanceRates:
    """The right shares of each source over all sequences. Those of a sequence are its own."""

    def __init__(self) -> None:
        self._sources: dict[GuessSource, RightShare] = {}

    def learn(self, own: dict[GuessSource, RightShare], source: GuessSource, *, right: bool) -> None:
        """Account for a guess that was right or wrong. ``own`` are the shares of its sequence."""
        self._share_of(own, source).add(right, OWN_DECAY)
        self._source(source).add(right, SOURCE_DECAY)

    def estimate(self, own: dict[GuessSource, RightShare], source: GuessSource) -> float:
        """Return the probability that the next guess of ``source`` is right, rather too low than too high."""
        return self._share_of(own, source).cautious

    def _share_of(self, own: dict[GuessSource, RightShare], source: GuessSource) -> RightShare:
        return own.setdefault(source, RightShare.assumed(self._source(source).mean))

    def _source(self, source: GuessSource) -> RightShare:
        return self._sources.setdefault(source, RightShare.assumed(UNKNOWN))
