"""Chooses where the prompts of one epoch are marked, and writes the edits for it, within the budget of prefixes."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.frames import Drop, Edit, Mark, Unmark
from cluster.core.limits import MARK_TOKENS
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.kept_marks import KeptMark, surplus
from cluster.scheduler.kv_cost import Cost, fits
from cluster.scheduler.prefixes import MIN_HIT, Prefixes
from cluster.scheduler.sequence import ScheduledSequence


class Marking:
    """The marks of live sequences. Appends to ``edits``. Does nothing if the model's caches can all be trimmed."""

    def __init__(self, capacity: Capacity, prefixes: Prefixes, edits: list[Edit]) -> None:
        self._capacity, self._prefixes, self._edits = capacity, prefixes, edits

    @property
    def caches_need_marks(self) -> bool:
        """Whether the model has caches that cannot be trimmed."""
        return self._capacity.mark_cost_of is not None

    def choose_chunk_ends(self, sequence: ScheduledSequence, parted: Iterable[int]) -> None:
        """Choose where chunks of a prompt end, so that it can be marked there.

        They end at its end, at its request's ``split_points``, and at the lengths ``parted``, where known sequences
        begin to differ from it.
        """
        if self.caches_need_marks:
            end = sequence.prefill_length
            likely = {*sequence.request.split_points, *parted}
            sequence.chunk_ends |= {at for at in likely if MIN_HIT <= at < end} | {end}

    def mark_progress(self, sequence: ScheduledSequence, free: Cost) -> None:
        """Mark a prompt that has got to one of its chunk ends, or far beyond its last mark."""
        length = len(sequence.fed)
        if length in sequence.chunk_ends or length - max(sequence.marks, default=0) >= MARK_TOKENS:
            self.mark(sequence, free)

    def mark(self, sequence: ScheduledSequence, free: Cost) -> None:
        """Mark a sequence where it is now, if there is room in ``free`` bytes. Drop marks that became too dense."""
        length, cost_of = len(sequence.fed), self._capacity.mark_cost_of
        if cost_of is None or length < MIN_HIT or length in sequence.marks:
            return
        for at in surplus(sequence.marks, length, sequence.chunk_ends):
            self._unmark(sequence, at)
        mark = KeptMark(cost_of(length))
        limit = tuple(map(min, self._capacity.prefix_budget, free))
        dropped = self._prefixes.make_room(mark.cost, limit)
        if dropped is not None:
            self._edits += [*map(Drop, dropped), Mark(sequence.id, length)]
            sequence.marks[length] = mark
            self._prefixes.hold([mark])

    def drop_marks(self, live: Iterable[ScheduledSequence], limit: Cost) -> None:
        """Drop marks of live sequences until prefixes and marks are within ``limit`` bytes per stage.

        Marks at chunk ends are dropped last.
        """
        for _, length, _, sequence in sorted((at in s.chunk_ends, at, s.id, s) for s in live for at in s.marks):
            if fits(self._prefixes.used, limit):
                return
            self._unmark(sequence, length)

    def release(self, sequence: ScheduledSequence) -> None:
        """Account for a sequence that leaves with its marks."""
        self._prefixes.release(sequence.marks.values())
        sequence.marks = {}

    def _unmark(self, sequence: ScheduledSequence, length: int) -> None:
        self._edits.append(Unmark(sequence.id, length))
        self._prefixes.release([sequence.marks.pop(length)])
