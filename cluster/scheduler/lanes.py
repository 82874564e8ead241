"""Lanes: the batches that decode together, one in each stage at a time. It keeps them even."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.scheduler.sequence import Sequence

Allowed = Callable[[list[list[Sequence]]], bool]
"""Whether memory allows lanes with these members."""


class LaneAssignment:
    """``count`` lanes of at most ``rows`` sequences. A lane whose decode frame is in the ring is busy."""

    def __init__(self, count: int, rows: int) -> None:
        self._rows = rows
        self.members: list[list[Sequence]] = [[] for _ in range(count)]
        self._busy: list[frozenset[int]] = [frozenset()] * count
        self._turns = 0

    def __iter__(self) -> Iterator[Sequence]:
        return (s for lane in self.members for s in lane)

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def with_one_more(self, sequence: Sequence) -> list[list[Sequence]] | None:
        """What the lanes would hold with this sequence in the emptiest; None where all are full."""
        lane = self._emptiest()
        if len(self.members[lane]) >= self._rows:
            return None
        return [[*m, sequence] if i == lane else m for i, m in enumerate(self.members)]

    def enter(self, sequence: Sequence) -> None:
        """Put a sequence in the emptiest lane."""
        sequence.lane = self._emptiest()
        self.members[sequence.lane].append(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.members[sequence.lane].remove(sequence)

    def rebalance(self, allowed: Allowed) -> None:
        """Move sequences that no frame is computing until no two lanes differ by more than one, as memory allows."""
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

    def _move(self, sequence: Sequence, lane: int, allowed: Allowed) -> bool:
        after = [[s for s in m if s is not sequence] for m in self.members]
        after[lane].append(sequence)
        if not allowed(after):
            return False
        self.members, sequence.lane = after, lane
        return True

    def ready(self) -> Iterator[tuple[int, list[Sequence]]]:
        """Lanes that are not busy and whose members have a token to feed, with those members.

        They come in the order in which they began to decode, so that a batch only ever grows at its end.
        """
        for lane, members in enumerate(self.members):
            waiting = [s for s in members if s.next_token is not None]
            if waiting and not self._busy[lane]:
                yield lane, sorted(waiting, key=lambda s: s.turn or self._turns + 1)

    def begin(self, lane: int, sequences: list[Sequence]) -> None:
        """A decode frame of these went out."""
        for sequence in sequences:
            if not sequence.turn:
                self._turns += 1
                sequence.turn = self._turns
        self._busy[lane] = frozenset(s.id for s in sequences)

    def end(self, lane: int) -> None:
        """A lane's decode frame came back."""
        self._busy[lane] = frozenset()

    def _emptiest(self) -> int:
        return min(range(len(self.members)), key=lambda i: len(self.members[i]))
