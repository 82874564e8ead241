"""Assigns sequences to lanes and keeps the lanes balanced.

A lane is a batch of sequences that decode together. With several lanes, each stage can work on a different one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cluster.scheduler.sequence import ScheduledSequence

Allowed = Callable[[list[list[ScheduledSequence]]], bool]
"""Returns whether memory allows lanes with these members."""


class LaneAssignment:
    """``count`` lanes of at most ``rows`` sequences. A lane whose decode frame is in the ring is busy.

    Of a chain of guesses, that frame is the first one.
    """

    def __init__(self, count: int, rows: int) -> None:
        self._rows = rows
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
        lane = self._emptiest()
        if len(self.members[lane]) >= self._rows:
            return None
        return [[*m, sequence] if i == lane else m for i, m in enumerate(self.members)]

    def enter(self, sequence: ScheduledSequence) -> None:
        """Add a sequence to the emptiest lane."""
        sequence.lane = self._emptiest()
        self.members[sequence.lane].append(sequence)

    def leave(self, sequence: ScheduledSequence) -> None:
        self.members[sequence.lane].remove(sequence)

    def rebalance(self, allowed: Allowed) -> None:
        """Move sequences between lanes until no two lanes differ by more than one, as far as memory allows.

        A sequence whose decode frame is in the ring is not moved.
        """
        while self._move_one(allowed):
            pass

    def _move_one(self, allowed: Allowed) -> bool:
        emptiest = self._emptiest()
        most = max(map(len, self.members))
        if most - len(self.members[emptiest]) < 2:
            return False
        for lane in [i for i, members in enumerate(self.members) if len(members) == most]:
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
        if self._frames[lane] != frame:
            return
        if len(advanced) == 1 and (chain := advanced[0].chain):
            self._frames[lane] = chain[0].number
        else:
            self._busy[lane], self._frames[lane] = frozenset(), -1

    def _emptiest(self) -> int:
        return min(range(len(self.members)), key=lambda i: len(self.members[i]))


def _is_awaited(sequence: ScheduledSequence, lane: list[ScheduledSequence]) -> bool:
    return any(other.next_token is not None for other in lane if other is not sequence)
