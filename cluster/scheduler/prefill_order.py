"""Chooses whose prompt gets the next prefill frame, and when a decoding lane goes first."""

from __future__ import annotations

from cluster.scheduler.deferred import DeferredSamples
from cluster.scheduler.lanes import LaneAssignment
from cluster.scheduler.sequence import Phase, ScheduledSequence


class PrefillOrder:
    """The turns of prompts among ``lanes``. ``limited``: others' tokens must not wait long for a chunk."""

    def __init__(self, lanes: LaneAssignment, deferred: DeferredSamples, *, limited: bool) -> None:
        self._lanes, self._deferred, self._limited = lanes, deferred, limited
        self._lanes_since_prefill: set[int] = set()

    def on_decode(self, lane: int) -> None:
        """Note that a lane got a decode frame."""
        self._lanes_since_prefill.add(lane)

    def on_prefill(self) -> None:
        """Note that a prompt got a prefill frame."""
        self._lanes_since_prefill.clear()

    def neediest(self) -> ScheduledSequence | None:
        """Return the sequence whose prompt has waited longest for a chunk. A new one goes behind those that wait."""
        return min(
            (s for s in self._lanes if s.unsent and s.joined),
            key=lambda s: (s.last_served_at_frame, s.id),
            default=None,
        )

    def next(self) -> ScheduledSequence | None:
        """Return the sequence to prefill next, or None if a decoding lane goes first.

        With a step limit, at most one chunk goes between two decode steps of a lane.
        """
        sequence = self.neediest()
        if sequence and self._limited and not self.lanes_decoding(sequence) <= self._lanes_since_prefill:
            return None
        return sequence

    def lanes_decoding(self, but: ScheduledSequence | None = None) -> set[int]:
        """Return the lanes in which sequences other than ``but`` decode. One that waits for its grammar does not."""
        decoding = (s for s in self._lanes if s is not but and s.phase is Phase.DECODE)
        return {s.lane for s in decoding if s not in self._deferred}

    def decoding(self) -> list[list[ScheduledSequence]]:
        """Return the members of the lanes in which sequences decode."""
        return [self._lanes.members[lane] for lane in sorted(self.lanes_decoding())]
