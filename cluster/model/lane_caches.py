"""Where each live sequence's caches are: by themselves, or as a row of a lane's batch.

A frame names the sequences of its step, and that is all it takes: ``gather`` makes the lane's batch hold just them, in
that order. A row whose sequence has left stays until the batch is gathered next, so that leaving and joining cost one
change of the batch. It knows ids and caches, and computes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.model.caches import BatchCaches, HeldCaches, SequenceCaches

__all__ = ["LaneCaches"]


@dataclass(slots=True)
class _Batch:
    """``rows`` has the sequence of each row, None where it has left."""

    rows: list[int | None]
    caches: BatchCaches


class LaneCaches:
    """Every live sequence's caches, by the sequence's id."""

    def __init__(self) -> None:
        self._alone: dict[int, SequenceCaches] = {}
        self._batches: dict[int, _Batch] = {}
        self._lane_of: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, a batch's padding and the rows of sequences that have just left included."""
        held: list[HeldCaches] = [*self._alone.values(), *(batch.caches for batch in self._batches.values())]
        return sum(caches.nbytes for caches in held)

    def put(self, sequence: int, caches: SequenceCaches) -> None:
        """Give a sequence these caches instead of those it had."""
        self.remove(sequence)
        self._alone[sequence] = caches

    def remove(self, sequence: int) -> None:
        """Forget a sequence's caches, if it has any. A batch goes with its last sequence."""
        self._alone.pop(sequence, None)
        lane = self._lane_of.pop(sequence, None)
        if lane is not None:
            rows = self._batches[lane].rows
            rows[rows.index(sequence)] = None
            if not any(row is not None for row in rows):
                del self._batches[lane]

    def alone(self, sequence: int) -> SequenceCaches:
        """A sequence's caches by themselves, taken out of its batch if they are in one."""
        if sequence in self._lane_of:
            self.put(sequence, self._extract(sequence))
        return self._alone[sequence]

    def copy(self, sequence: int) -> SequenceCaches:
        """A copy of a sequence's caches, which stay where they are."""
        return self._extract(sequence) if sequence in self._lane_of else self._alone[sequence].copy()

    def gather(self, lane: int, sequences: Sequence[int]) -> HeldCaches:
        """The caches to compute one step of these different sequences with, rows in their order.

        One sequence computes alone and leaves the lane's batch as it is. For more, the batch becomes just these: new
        ones come in from wherever they are, and live ones that are not named go by themselves.
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
            return BatchCaches.merged(coming)
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
