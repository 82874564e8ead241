"""The data plane's interface: what the coordinator and the engines ask of it, whatever carries the bytes.

``grpc_streams`` carries them over gRPC; ``in_memory`` within one process for tests, where it can lose, delay and cut.

A stage owns an ``Outbox`` for each line: its finished frames, in order, for the one party that pulls them. A stream
belongs to one line and has a connection of its own, so that what is urgent never waits behind bulk. A stage takes
frames in from a feed (the coordinator pushes) or from a pull (of the stage before). Callbacks run on the transport's
threads; they must only hand the bytes on.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Protocol

from cluster.core.limits import MAX_FRAMES_WAITING, MAX_WAITING_BYTES
from cluster.security.trust import WORKER

Received = Callable[[bytes], None]
Lost = Callable[[str], None]
"""Told once, with a sentence, when a stream ends that nobody closed."""


class Line(StrEnum):
    """Which messages a stream carries. Each line keeps its own order; between the two there is none."""

    URGENT = "urgent"
    BULK = "bulk"


class Sender(Protocol):
    """The coordinator's end of a feed."""

    def send(self, message: bytes) -> None:
        """Queue a message; never blocks. What cannot be delivered ends in ``Lost``."""

    def close(self) -> None:
        """End the stream; idempotent."""


class Subscription(Protocol):
    """The end of a pull that receives."""

    def close(self) -> None:
        """End the stream; idempotent."""


class Dialer(Protocol):
    """Opens streams to data ports, given as ``host:port``. Both calls return once the other end has accepted.

    ``peer`` is who must answer there (see ``cluster.security.trust``). They raise ``Unreachable`` where nobody answers
    in time, and ``StaleEpoch`` where that stage is not loaded there.
    """

    def feed(self, address: str, epoch: int, lost: Lost, line: Line = Line.URGENT, peer: str = WORKER) -> Sender: ...

    def pull(
        self, address: str, epoch: int, received: Received, lost: Lost, line: Line = Line.URGENT, peer: str = WORKER
    ) -> Subscription: ...


class Outbox:
    """Messages of one epoch on their way to one reader. Bounded in number and in bytes (one message may always wait):
    a full one ends the stream with a sentence. Once closed it takes none.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        # A SimpleQueue wakes its reader in half of a Queue's time; its bounds are kept by whoever sends.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sent = self._read = 0
        """Bytes; each is written by one thread alone."""
        self._taken = self._closed = False
        self.overflowed = False

    @property
    def waiting_bytes(self) -> int:
        """Of messages that nobody has read yet."""
        return max(0, self._sent - self._read)

    def send(self, message: bytes) -> None:
        if self._closed:
            return
        waiting = self.waiting_bytes
        too_much = waiting and waiting + len(message) > MAX_WAITING_BYTES
        if too_much or self._queue.qsize() >= MAX_FRAMES_WAITING:
            self.overflowed = True
            self.close()
        else:
            self._sent += len(message)
            self._queue.put(message)

    def take(self) -> bool:
        """Claim the only reader's place; False where it is taken."""
        taken, self._taken = self._taken, True
        return not taken

    def close(self) -> None:
        """Let the reader end after what is waiting, or at once where that is too much."""
        self._closed = True
        while self.overflowed and not self._queue.empty():
            self._drop_one()
        self._queue.put(None)

    def _drop_one(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:
            return

    def __iter__(self) -> Iterator[bytes]:
        """Messages until the outbox closes; blocks between them."""
        while (message := self._queue.get()) is not None and not self.overflowed:
            self._read += len(message)
            yield message
