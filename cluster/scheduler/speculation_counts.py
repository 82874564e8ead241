"""Counts guesses by their source, those that lacked memory, and the compute that wrong ones wasted on each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.core.frames import StageTiming
from cluster.scheduler.guessing import GuessSource


@dataclass(slots=True)
class SourceCounts:
    """Tokens that were sent as guesses: ``guessed`` in all, ``accepted`` of them right, ``voided`` of no use.

    ``rows`` of them followed another token in one frame.
    """

    guessed: int = 0
    accepted: int = 0
    voided: int = 0
    rows: int = 0


@dataclass(slots=True)
class SpeculationCounts:
    """The counts since the coordinator started. ``wasted_s`` is in seconds, by the stage's index in its epoch.

    ``without_room`` counts how often a sequence was not guessed because there was no memory for marks.
    """

    by_source: dict[GuessSource, SourceCounts] = field(default_factory=dict)
    wasted_s: list[float] = field(default_factory=list)
    without_room: int = 0

    def of(self, source: GuessSource) -> SourceCounts:
        return self.by_source.setdefault(source, SourceCounts())

    def waste(self, timings: Sequence[StageTiming], share: float = 1.0) -> None:
        """Add the ``share`` of a frame's times that wrong guesses took. A stage that skipped it took next to none."""
        for timing in timings:
            self.wasted_s += [0.0] * (timing.stage + 1 - len(self.wasted_s))
            self.wasted_s[timing.stage] += share * timing.compute_us / 1e6

    def copy(self) -> SpeculationCounts:
        """Return a copy that does not change any more."""
        return SpeculationCounts(
            {s: replace(c) for s, c in self.by_source.items()}, list(self.wasted_s), self.without_room
        )
