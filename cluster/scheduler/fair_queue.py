"""The queue of waiting requests, shared fairly between clients.

It uses start-time fair queueing. Each client has a virtual clock. Taking a request advances its client's clock by the
request's cost: its maximum tokens (prompt and answer) divided by 1 + priority. The next request is the oldest request
of the client whose clock is furthest behind. A client that sends a hundred requests delays itself, not other clients,
and no client starves.

A lone client may fill the queue. Once it is full, a client that holds less than an equal share still gets in, and
displaces the newest requests of the client that holds most.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from cluster.core.errors import Busy
from cluster.core.limits import RETRY_AFTER_S
from cluster.scheduler.sequence import ScheduledSequence


class FairQueue:
    """At most ``most`` waiting requests."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._returning: deque[ScheduledSequence] = deque()
        self._queues: dict[str, deque[ScheduledSequence]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._returning) + sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[ScheduledSequence]:
        """Iterate over all waiting requests: first those that were put back, then the rest in order of arrival."""
        arrived = sorted((s for q in self._queues.values() for s in q), key=lambda s: s.id)
        return iter((*self._returning, *arrived))

    def make_room(self, client: str, count: int) -> list[ScheduledSequence]:
        """Make room for ``count`` more sequences of ``client``. Remove and return those that they displace.

        A request is displaced whole, and only before any of its samples has begun. Raise ``Busy``, and displace
        nothing, if the room of clients with more than an equal share is not enough.
        """
        held = Counter(s.request.client for s in self)
        need = held.total() + count - self._most
        share = self._most // len({*held, client})
        displaced: list[ScheduledSequence] = []
        if need > 0 and held[client] + count <= share:
            displaced = self._displaceable(held, share, need)
        if len(displaced) < need:
            raise Busy(
                f"the queue is full: {held.total()} samples wait, {held[client]} of them yours, and {count} more are "
                "too many; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        for sequence in displaced:
            self.remove(sequence)
        return displaced

    def _displaceable(self, held: Counter[str], share: int, need: int) -> list[ScheduledSequence]:
        """Return at least ``need`` sequences of the clients that hold most, newest first; fewer if there are fewer."""
        batches = {client: self._whole_batches(client) for client in self._queues if held[client] > share}
        displaced: list[ScheduledSequence] = []
        while len(displaced) < need and batches:
            client = max(batches, key=lambda name: held[name])
            batch = next(batches[client], None)
            if batch is None:
                del batches[client]
                continue
            displaced += batch
            held[client] -= len(batch)
            if held[client] <= share:
                del batches[client]
        return displaced

    def _whole_batches(self, client: str) -> Iterator[list[ScheduledSequence]]:
        """Iterate over a client's requests of which every sample waits and none has begun, newest first."""
        waiting: dict[tuple[str, ...], list[ScheduledSequence]] = {}
        for sequence in self._queues[client]:
            waiting.setdefault(sequence.batch, []).append(sequence)
        for batch, sequences in reversed(waiting.items()):
            if len(sequences) == len(batch) and not any(s.answer for s in sequences):
                yield sequences

    def add(self, sequence: ScheduledSequence) -> None:
        client = sequence.request.client
        self._clocks[client] = max(self._clocks.get(client, 0.0), self._now)
        self._queues.setdefault(client, deque()).append(sequence)

    def put_back(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Put admitted requests that lost their stages back at the front. They keep their order and are not charged."""
        self._returning = deque((*sequences, *self._returning))

    def is_returning(self, sequence: ScheduledSequence) -> bool:
        """Return whether a request was put back."""
        return sequence in self._returning

    def tokens_ahead(self, client: str, tokens: int) -> int:
        """Return how many prompt tokens are read before those of a new request of ``tokens`` tokens, about.

        All of the client's own requests go first, and of each other client no more than the client has then.
        """
        waiting = {name: sum(len(s.base) for s in queue) for name, queue in self._queues.items()}
        own = waiting.pop(client, 0)
        share = sum(min(theirs, own + tokens) for theirs in waiting.values())
        return sum(len(s.base) for s in self._returning) + own + share

    def first(self) -> ScheduledSequence | None:
        """Return the request that is next, or None if the queue is empty."""
        if self._returning:
            return self._returning[0]
        client = self._next_client()
        return self._queues[client][0] if client is not None else None

    def take(self) -> ScheduledSequence:
        """Remove and return the next request. Advance its client's clock, unless the request was put back."""
        if self._returning:
            return self._returning.popleft()
        client = self._next_client()
        assert client is not None, "the queue is empty"
        sequence = self._queues[client].popleft()
        self._now = self._clocks[client]
        request = sequence.request
        self._clocks[client] += (len(request.prompt) + request.max_tokens) / (1 + request.priority)
        self._discard_idle_clocks(client)
        return sequence

    def remove(self, sequence: ScheduledSequence) -> None:
        if sequence in self._returning:
            self._returning.remove(sequence)
            return
        self._queues[sequence.request.client].remove(sequence)
        self._discard_idle_clocks(sequence.request.client)

    def _next_client(self) -> str | None:
        waiting = self._queues.items()
        return min(waiting, key=lambda item: (self._clocks[item[0]], item[1][0].id), default=(None, None))[0]

    def _discard_idle_clocks(self, client: str) -> None:
        """Delete the client's queue if it is empty, and the clocks of idle clients that are not ahead.

        Such a clock carries no information: ``add`` starts a returning client at the current virtual time or later.
        """
        if not self._queues[client]:
            del self._queues[client]
        for idle in [c for c, t in self._clocks.items() if t <= self._now and c not in self._queues]:
            del self._clocks[idle]
        if not self._queues:
            self._clocks.clear()
            self._now = 0.0
