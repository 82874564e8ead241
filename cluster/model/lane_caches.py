"""Keeps each live sequence's caches, either separate or as a row of a lane's batch.

A frame names the sequences of its step, and ``gather`` makes the lane's batch hold exactly these, in that order. The
row of a sequence that has left stays until the next ``gather``, so that leaving and joining cost one change of the
batch. It knows ids and caches; it does not run models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.model.caches import BatchCaches, HeldCaches, SequenceCaches
from cluster.model.marks import CacheMark

__all__ = ["LaneCaches"]


@dataclass(slots=True)
class _Batch:
    """The batch of a lane. ``rows`` has the sequence of each row, None if the sequence has left."""

    rows: list[int | None]
    caches: BatchCaches


class LaneCaches:
    """Holds every live sequence's caches, by the sequence's id."""

    def __init__(self) -> None:
        self._alone: dict[int, SequenceCaches] = {}
        self._batches: dict[int, _Batch] = {}
        self._lane_of: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all caches, with a batch's padding and the rows of sequences that have left."""
        held: list[HeldCaches] = [*self._alone.values(), *(batch.caches for batch in self._batches.values())]
        return sum(caches.nbytes for caches in held)

    def put(self, sequence: int, caches: SequenceCaches) -> None:
        """Set a sequence's caches; any it had before are removed."""
        self.remove(sequence)
        self._alone[sequence] = caches

    def remove(self, sequence: int) -> None:
        """Remove a sequence's caches, if it has any. A batch is removed with its last sequence."""
        self._alone.pop(sequence, None)
        lane = self._lane_of.pop(sequence, None)
        if lane is not None:
            rows = self._batches[lane].rows
            rows[rows.index(sequence)] = None
            if not any(row is not None for row in rows):
                del self._batches[lane]

    def alone(self, sequence: int) -> SequenceCaches:
        """Return a sequence's separate caches. If it is a row of a batch, move it out of the batch first."""
        if sequence in self._lane_of:
            self.put(sequence, self._extract(sequence))
        return self._alone[sequence]

    def copy(self, sequence: int) -> SequenceCaches:
        """Return a copy of a sequence's caches. The sequence stays where it is, in its lane or alone."""
        return self._extract(sequence) if sequence in self._lane_of else self._alone[sequence].copy()

    def mark(self, sequence: int) -> CacheMark:
        """Return a mark of a sequence's current position, without moving its caches."""
        in_lane = sequence in self._lane_of
        return (self._extract(sequence) if in_lane else self._alone[sequence]).mark()

    def gather(self, lane: int, sequences: Sequence[int]) -> HeldCaches:
        """Return the caches for one step of ``sequences`` (without duplicates), rows in that order.

        A single sequence uses separate caches, and the lane's batch stays as it is. For several, the batch is changed
        to hold exactly these: new ones move in from wherever they are, and other live ones move out.
        """
        if len(sequences) == 1:
            return self.alone(sequences[0])
        for other in set(self._members(lane)).difference(sequences):
            self.alone(other)
        staying = [sequence for sequence in sequences if self._lane_of.get(sequence) == lane]
        coming = [sequence for sequence in sequences if self._lane_of.get(sequence) != lane]
        caches = self._batch(lane, staying, [self.alone(sequence) for sequence in coming])
        for sequence in coming:
            del self._alone[sequence]
            self._lane_of[sequence] = lane
        self._batches[lane] = _Batch([*staying, *coming], caches)
        self._order(self._batches[lane], sequences)
        return caches

    def _batch(self, lane: int, staying: list[int], coming: list[SequenceCaches]) -> BatchCaches:
        if not staying:
            return BatchCaches.merge(coming)
        batch = self._batches[lane]
        self._order(batch, staying)
        if coming:
            batch.caches.extend(coming)
        return batch.caches

    def _order(self, batch: _Batch, sequences: Sequence[int]) -> None:
        if batch.rows != list(sequences):
            batch.caches.keep([batch.rows.index(sequence) for sequence in sequences])
            batch.rows = list(sequences)

    def _members(self, lane: int) -> list[int]:
        return [sequence for sequence, where in self._lane_of.items() if where == lane]

    def _extract(self, sequence: int) -> SequenceCaches:
        batch = self._batches[self._lane_of[sequence]]
        return batch.caches.extract(batch.rows.index(sequence))
