"""Estimates how often the next guess of a source is right, for one sequence and for all before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.scheduler.guessing import GuessSource

UNKNOWN: Final = 0.5
"""What a source is taken to reach before anything is known of it."""
PRIOR_WEIGHT: Final = 4.0
"""Guesses of a sequence that weigh as much as what is known of its source."""
OWN_DECAY, SOURCE_DECAY = 15 / 16, 255 / 256


@dataclass(slots=True)
class RightShare:
    """The share of right guesses. Older ones count less and less."""

    right: float = 0.0
    total: float = 0.0

    def add(self, right: bool, decay: float) -> None:
        self.right = decay * self.right + right
        self.total = decay * self.total + 1

    def estimate(self, prior: float) -> float:
        return (self.right + PRIOR_WEIGHT * prior) / (self.total + PRIOR_WEIGHT)


class Acceptance:
    """The right shares of each source over all sequences. Those of a sequence are its own."""

    def __init__(self) -> None:
        self._sources: dict[GuessSource, RightShare] = {}

    def learn(self, own: dict[GuessSource, RightShare], source: GuessSource, *, right: bool) -> None:
        """Account for a guess that was right or wrong. ``own`` are the shares of its sequence."""
        own.setdefault(source, RightShare()).add(right, OWN_DECAY)
        self._sources.setdefault(source, RightShare()).add(right, SOURCE_DECAY)

    def estimate(self, own: dict[GuessSource, RightShare], source: GuessSource) -> float:
        """Return the probability that the next guess of ``source`` is right."""
        prior = self._sources.get(source, RightShare()).estimate(UNKNOWN)
        return own.get(source, RightShare()).estimate(prior)
