"""Saves sequences on the stages as kept prefixes, if there is room: those that end, and leaders while they prefill.

A failed step spoils the caches of its sequence, but no prefix that was saved before that step. So a leader is saved now
and then while others wait for it. If a step of it fails, one that waits takes over at the last such save.
"""

from __future__ import annotations

from cluster.core.frames import Drop, Edit, Save
from cluster.core.limits import MARK_TOKENS
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.kv_cost import Cost, fits
from cluster.scheduler.prefixes import Prefixes, PrefixSource
from cluster.scheduler.sequence import SavedProgress, ScheduledSequence


class Saving:
    """Saves live sequences as prefixes. Appends to ``edits``.

    Its methods take the bytes per stage that are ``free`` beside live sequences, and the number of the next ``frame``.
    """

    def __init__(self, capacity: Capacity, prefixes: Prefixes, edits: list[Edit]) -> None:
        self._capacity, self._prefixes, self._edits = capacity, prefixes, edits

    def keep(self, sequence: ScheduledSequence, free: Cost, frame: int) -> int | None:
        """Save a sequence that has ended, drop the prefixes that this makes redundant, and return the new one."""
        prefix = self._save(sequence, free, frame)
        if prefix is not None:
            redundant = self._prefixes.discard(save.prefix for save in sequence.saves)
            redundant += self._prefixes.drop_redundant(prefix, sequence.start)
            self._edits += map(Drop, redundant)
        return prefix

    def save_progress(self, leader: ScheduledSequence, free: Cost, frame: int) -> None:
        """Save what a leader has prefilled, if that is ``MARK_TOKENS`` more than when it was last saved.

        A step that is still in the ring may fail and spoil the save. So the last save stays until the next one, and
        that is made only when every step before the last save has come back.
        """
        length, last = len(leader.fed), leader.saves[-1].length if leader.saves else leader.cached
        if length - last < MARK_TOKENS or leader.prefilled < last:
            return
        prefix = self._save(leader, free, frame)
        if prefix is not None:
            self._edits += map(Drop, self._prefixes.discard(save.prefix for save in leader.saves[:-1]))
            leader.saves = [*leader.saves[-1:], SavedProgress(prefix, length)]

    def _save(self, sequence: ScheduledSequence, free: Cost, frame: int) -> int | None:
        """Save a sequence where it is now. Return the prefix, or None if there is no room."""
        tokens = tuple(sequence.fed)
        cost = self._capacity.cost_of(max(len(tokens), 1))
        if not fits(cost, free):
            return None
        source = PrefixSource(sequence.id, frame)
        prefix, dropped = self._prefixes.keep(sequence.owner, tokens, cost, source, sequence.marks)
        self._edits += map(Drop, dropped)
        if prefix is not None:
            self._edits.append(Save(sequence.id, prefix))
            self._edits += map(Drop, self._prefixes.evict_to(free))
        return prefix
