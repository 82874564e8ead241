"""Chooses where the prompts of one epoch are marked, and writes the edits for it, within the budget of prefixes.

A mark is the state, at one length, of the caches that cannot be trimmed; a prompt can start from it (``kept_marks``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from cluster.core.frames import Drop, Edit, Mark, Unmark
from cluster.core.limits import MARK_TOKENS
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.kept_marks import KeptMark, space_out, surplus
from cluster.scheduler.kv_cost import Cost, fits
from cluster.scheduler.prefixes import MIN_HIT, Prefixes
from cluster.scheduler.sequence import ScheduledSequence

_BORDER_SHARE: Final = 1 / 64
"""Least distance of a mark at a border from others, as a share of the tokens before it. A later prompt that parts at a
border reads about so much again of what it shares, wherever that is, ..."""
_LEAST_BORDER_GAP: Final = 64
"""... or as many tokens, if that is more."""
_CUT_SHARE: Final = 1 / 8
"""Most of a chunk's time that its fixed cost may be if it ends at a border."""
_BORDER_MEMORY: Final = 1 / 16
"""Share of the budget of prefixes that marks at the borders of one prompt may take: many prompts are kept."""


class Marking:
    """The marks of live sequences. Appends to ``edits``. Does nothing if the model's caches can all be trimmed.

    ``fixed_cost`` returns what a chunk costs beside its tokens, in tokens.
    """

    def __init__(
        self, capacity: Capacity, prefixes: Prefixes, edits: list[Edit], fixed_cost: Callable[[], float]
    ) -> None:
        self._capacity, self._prefixes, self._edits = capacity, prefixes, edits
        self._fixed_cost = fixed_cost

    @property
    def caches_need_marks(self) -> bool:
        """Whether the model has caches that cannot be trimmed."""
        return self._capacity.mark_cost_of is not None

    def choose_chunk_ends(self, sequence: ScheduledSequence, parted: Iterable[int]) -> None:
        """Choose where chunks of a prompt end, so that it can be marked there.

        They end at its end, at its request's ``split_points``, at the lengths ``parted``, where known sequences begin
        to differ from it, and at as many of its ``borders`` as cost little.
        """
        if self._capacity.mark_cost_of:
            end = sequence.prefill_length
            likely = {*sequence.request.split_points, *parted}
            sequence.chunk_ends |= {at for at in likely if MIN_HIT <= at < end} | {end}
            sequence.chunk_ends |= self._affordable_borders(sequence, self._capacity.mark_cost_of(end))

    def _affordable_borders(self, sequence: ScheduledSequence, cost: Cost) -> set[int]:
        """Return the borders of a prompt at which it is marked, where a mark costs ``cost`` bytes.

        Those that it has passed without a mark are of no use any more.
        """
        room = [share * _BORDER_MEMORY // c for share, c in zip(self._capacity.prefix_budget, cost, strict=True) if c]
        sparser = 1
        while len(chosen := self._space_borders(sequence, sparser)) > min(room, default=len(chosen)):
            sparser *= 2
        return chosen

    def _space_borders(self, sequence: ScheduledSequence, sparser: int) -> set[int]:
        """Return the borders that are marked already or may be, ``sparser`` times as far apart as they need to be."""
        now, least = len(sequence.fed), self._fixed_cost() / _CUT_SHARE

        def gap(at: int) -> float:
            return sparser * max(_LEAST_BORDER_GAP, at * _BORDER_SHARE)

        def gap_of_new(at: int) -> float:
            return max(gap(at), least)

        chosen = space_out((at for at in sequence.request.borders if at in sequence.marks), gap, sequence.chunk_ends)
        ahead = (at for at in sequence.request.borders if now + gap_of_new(at) <= at < sequence.prefill_length)
        return chosen | space_out(ahead, gap_of_new, chosen | sequence.chunk_ends)

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
