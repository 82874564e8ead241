"""Adds up what live sequences, kept prefixes and marks take of each stage's memory for caches, at worst."""

from __future__ import annotations

from collections.abc import Callable

from cluster.scheduler.capacity import Capacity
from cluster.scheduler.in_flight import InFlightFrames
from cluster.scheduler.kv_cost import Cost, fits, lane_cost, total
from cluster.scheduler.lanes import LaneAssignment
from cluster.scheduler.prefixes import Prefixes
from cluster.scheduler.sequence import ScheduledSequence


class CacheMemory:
    """The memory of one epoch's stages. It counts whatever the other objects hold.

    ``taken`` are the bytes per stage that adapters have taken since the epoch began; below 0 if they were removed.

    ``reading`` returns the bytes per stage of the prefixes that are being read from disks.
    """

    def __init__(
        self,
        capacity: Capacity,
        lanes: LaneAssignment,
        flights: InFlightFrames,
        prefixes: Prefixes,
        reading: Callable[[], Cost],
    ) -> None:
        self._capacity, self._lanes, self._flights, self.prefixes = capacity, lanes, flights, prefixes
        self._reading = reading
        self.taken: Cost = (0,) * len(capacity.budget)

    @property
    def reserved(self) -> Cost:
        """Worst-case bytes of the live sequences' caches, per stage."""
        return tuple(c - t for c, t in zip(self.cost(self._lanes.members), self.taken, strict=True))

    def why_never_fits(self, tokens: int) -> str:
        """Return why a sequence of ``tokens`` tokens can never be admitted, or an empty string if it can."""
        return self._capacity.why_never_fits(tokens, self.taken)

    def cost(self, members: list[list[ScheduledSequence]]) -> Cost:
        """Return the worst-case bytes of lanes with these members, of leaving sequences, of reads, and of adapters."""
        lanes = [*members, *([s] for s in self._flights.leaving)]
        costs = [lane_cost([s.reserved for s in lane], self._capacity.cost_of) for lane in lanes if lane]
        costs += [self._guess_mark_cost(s, s.guess_marks) for lane in lanes for s in lane if s.guess_marks]
        return total((*costs, self._reading(), self.taken), len(self._capacity.budget))

    def beside_prefixes(self) -> Cost:
        """Return the bytes that kept prefixes and marks leave for live sequences, per stage."""
        return tuple(b - p for b, p in zip(self._capacity.budget, self.prefixes.used, strict=True))

    def beside_sequences(self) -> Cost:
        """Return the bytes that live sequences leave for prefixes and marks, per stage."""
        used = self.cost(self._lanes.members)
        return tuple(b - u for b, u in zip(self._capacity.budget, used, strict=True))

    def has_room_for_marks(self, sequence: ScheduledSequence, count: int) -> bool:
        """Return whether ``count`` marks for guesses of a sequence fit beside all that is kept and reserved."""
        more = self._guess_mark_cost(sequence, count - sequence.guess_marks)
        return fits(total((self.cost(self._lanes.members), more), len(more)), self.beside_prefixes())

    def _guess_mark_cost(self, sequence: ScheduledSequence, count: int) -> Cost:
        mark_cost_of = self._capacity.mark_cost_of
        cost = mark_cost_of(sequence.reserved) if mark_cost_of else (0,) * len(self._capacity.budget)
        return tuple(count * nbytes for nbytes in cost)
