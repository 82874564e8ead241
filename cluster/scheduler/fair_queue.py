"""The queue: first come first served, shared fairly between clients.

Start-time fair queueing: each client has a clock that advances by what its requests cost (tokens they may take,
divided by 1 + priority); the next request is the oldest of the client whose clock is furthest behind. A client that
sends a hundred requests waits for itself, not the others for it, and nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from cluster.scheduler.sequence import Sequence


class FairQueue:
    """Requests that wait, at most ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._returning: deque[Sequence] = deque()
        self._queues: dict[str, deque[Sequence]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._returning) + sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in order of arrival; those that were put back first."""
        arrived = sorted((s for q in self._queues.values() for s in q), key=lambda s: s.id)
        return iter((*self._returning, *arrived))

    def has_room(self, count: int) -> bool:
        return len(self) + count <= self._most

    def add(self, sequence: Sequence) -> None:
        client = sequence.request.client
        self._clocks[client] = max(self._clocks.get(client, 0.0), self._now)
        self._queues.setdefault(client, deque()).append(sequence)

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """These had their turn already, and lost their place through no fault of theirs: they go first."""
        self._returning = deque((*sequences, *self._returning))

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        if self._returning:
            return self._returning[0]
        client = self._turn()
        return self._queues[client][0] if client is not None else None

    def take(self) -> Sequence:
        """Take out whose turn it is; its client's clock advances, unless it was put back."""
        if self._returning:
            return self._returning.popleft()
        client = self._turn()
        assert client is not None, "nobody waits"
        sequence = self._queues[client].popleft()
        self._now = self._clocks[client]
        request = sequence.request
        self._clocks[client] += (len(request.prompt) + request.max_tokens) / (1 + request.priority)
        self._tidy(client)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        if sequence in self._returning:
            self._returning.remove(sequence)
            return
        self._queues[sequence.request.client].remove(sequence)
        self._tidy(sequence.request.client)

    def _turn(self) -> str | None:
        waiting = self._queues.items()
        return min(waiting, key=lambda item: (self._clocks[item[0]], item[1][0].id), default=(None, None))[0]

    def _tidy(self, client: str) -> None:
        """Forget empty queues, and the clocks that say nothing: who comes back starts from now at the earliest."""
        if not self._queues[client]:
            del self._queues[client]
        for passed in [c for c, t in self._clocks.items() if t <= self._now and c not in self._queues]:
            del self._clocks[passed]
        if not self._queues:
            self._clocks.clear()
            self._now = 0.0
