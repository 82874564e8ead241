"""Assigns sequences to lanes and keeps the lanes balanced.

A lane is a batch of sequences that decode together. With several lanes, each stage can work on a different one. All
sequences of a lane have the same adapter. So that none waits for another adapter's lane to become empty, each adapter
may have as many lanes as there are without adapters; but it gets a lane beyond those only if its own are full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cluster.scheduler.sequence import ScheduledSequence

Allowed = Callable[[list[list[ScheduledSequence]]], bool]
"""Returns whether memory allows lanes with these members."""


class LaneAssignment:
    """``count`` lanes, or more with adapters, of at most ``rows`` sequences. A lane whose decode frame is in the ring
    is busy. Of a chain of guesses, that frame is the first one.
    """

    def __init__(self, count: int, rows: int) -> None:
        self._count, self._rows = count, rows
        self.members: list[list[ScheduledSequence]] = [[] for _ in range(count)]
        self._busy: list[frozenset[int]] = [frozenset()] * count
        self._frames = [-1] * count
        """The number of the frame that each lane is busy with."""
        self._turns = 0

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return (s for lane in self.members for s in lane)

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def with_one_more(self, sequence: ScheduledSequence) -> list[list[ScheduledSequence]] | None:
        """Return the lanes' members with this sequence added to the emptiest lane, or None if all lanes are full."""
        lane = self._lane_for(sequence)
        if lane is None:
            return None
        members = [*self.members, []] if lane == len(self.members) else self.members
        return [[*m, sequence] if i == lane else m for i, m in enumerate(members)]

    def enter(self, sequence: ScheduledSequence) -> None:
        """Add a sequence to the emptiest lane of its adapter, which must have room for it."""
        lane = self._lane_for(sequence)
        assert lane is not None, "all lanes are full"
        if lane == len(self.members):
            self.members.append([])
            self._busy.append(frozenset())
            self._frames.append(-1)
        sequence.lane = lane
        self.members[lane].append(sequence)

    def leave(self, sequence: ScheduledSequence) -> None:
        self.members[sequence.lane].remove(sequence)
        self._close_unused()

    def _close_unused(self) -> None:
        """Remove the last lanes beyond ``count`` while they are empty and idle."""
        while len(self.members) > self._count and not self.members[-1] and not self._busy[-1]:
            for column in (self.members, self._busy, self._frames):
                column.pop()

    def _lane_for(self, sequence: ScheduledSequence) -> int | None:
        """Return the lane that a sequence enters, perhaps one behind the last; None if it has to wait."""
        own = self._lanes_of(sequence.request.adapter)
        lanes = [lane for lane in own if len(self.members[lane]) < self._rows]
        if len(own) < self._count and (not lanes or self._has_spare()):
            lanes.append(self._first_empty())
        return min(lanes, key=lambda i: (self._size(i), i), default=None)

    def _lanes_of(self, adapter: str) -> list[int]:
        return [i for i, members in enumerate(self.members) if members and members[0].request.adapter == adapter]

    def _has_spare(self) -> bool:
        """Return whether fewer than ``count`` lanes have members."""
        return sum(map(bool, self.members)) < self._count

    def _first_empty(self) -> int:
        return next((i for i, members in enumerate(self.members) if not members), len(self.members))

    def _size(self, lane: int) -> int:
        return len(self.members[lane]) if lane < len(self.members) else 0

    def rebalance(self, allowed: Allowed) -> None:
        """Move sequences between lanes until no two of one adapter differ by more than one, as far as memory allows.

        A sequence whose decode frame is in the ring is not moved.
        """
        for adapter in dict.fromkeys(members[0].request.adapter for members in self.members if members):
            while self._move_one(adapter, allowed):
                pass

    def _move_one(self, adapter: str, allowed: Allowed) -> bool:
        own = self._lanes_of(adapter)
        spare = [self._first_empty()] if len(own) < self._count and self._has_spare() else []
        emptiest = min((*own, *spare), key=lambda i: (self._size(i), i))
        most = max(self._size(lane) for lane in own)
        if most - self._size(emptiest) < 2:
            return False
        for lane in [lane for lane in own if self._size(lane) == most]:
            for sequence in reversed(self.members[lane]):
                if sequence.id not in self._busy[lane] and self._move(sequence, emptiest, allowed):
                    return True
        return False

    def _move(self, sequence: ScheduledSequence, lane: int, allowed: Allowed) -> bool:
        after = [[s for s in m if s is not sequence] for m in self.members]
        after[lane].append(sequence)
        if not allowed(after):
            return False
        self.members, sequence.lane = after, lane
        return True

    def ready(self) -> Iterator[tuple[int, list[ScheduledSequence]]]:
        """Yield each idle lane that has members with a token to feed, together with those members.

        The members are in the order in which they began to decode, so that a batch only grows at its end.
        """
        for lane, members in enumerate(self.members):
            waiting = [s for s in members if s.next_token is not None]
            if waiting and not self._busy[lane]:
                yield lane, sorted(waiting, key=lambda s: s.turn or self._turns + 1)

    def blocking(self) -> list[ScheduledSequence]:
        """Return the sequences whose guesses keep a lane busy, for whose next step another member is waiting."""
        return [s for lane in self.members if len(lane) > 1 for s in lane if len(s.chain) > 1 and _is_awaited(s, lane)]

    def begin(self, lane: int, sequences: list[ScheduledSequence], frame: int) -> None:
        """Mark a lane busy: decode frame number ``frame``, of ``sequences``, was written."""
        for sequence in sequences:
            if not sequence.turn:
                self._turns += 1
                sequence.turn = self._turns
        self._busy[lane] = frozenset(s.id for s in sequences)
        self._frames[lane] = frame

    def end(self, lane: int, frame: int, advanced: Sequence[ScheduledSequence]) -> None:
        """Mark a lane idle: decode frame number ``frame`` came back. Do nothing if it was busy with another one.

        A lone sequence that has ``advanced`` keeps it busy, if a guess that turned out right is under way.
        """
        if lane >= len(self._frames) or self._frames[lane] != frame:
            return
        if len(advanced) == 1 and (chain := advanced[0].chain):
            self._frames[lane] = chain[0].number
        else:
            self._busy[lane], self._frames[lane] = frozenset(), -1
            self._close_unused()


def _is_awaited(sequence: ScheduledSequence, lane: list[ScheduledSequence]) -> bool:
    return any(other.next_token is not None for other in lane if other is not sequence)
