"""The data plane's interface for the coordinator and the engines, independent of what carries the bytes.

``grpc_streams`` implements it over gRPC; ``in_memory`` within one process for tests, with fault injection.

A stage owns an ``Outbox`` for each line. It holds the stage's finished frames, in order, for the one reader that pulls
them. A stream belongs to one line and has a connection of its own, so that urgent messages never wait behind bulk ones.
A stage receives frames from a feed (the coordinator pushes) or from a pull (from the stage before it). Callbacks run on
the transport's threads and must only pass the bytes on.
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
"""Called once, with a reason, when a stream ends without ``close``."""


class Line(StrEnum):
    """The kind of messages that a stream carries. Each line keeps its order; there is no order between the lines."""

    URGENT = "urgent"
    BULK = "bulk"


class Sender(Protocol):
    """The coordinator's end of a feed."""

    def send(self, message: bytes) -> None:
        """Queue a message. Never block. A message that cannot be delivered leads to a call of ``Lost``."""

    def close(self) -> None:
        """End the stream; idempotent."""


class Subscription(Protocol):
    """The receiving end of a pull."""

    def close(self) -> None:
        """End the stream; idempotent."""


class Dialer(Protocol):
    """Opens streams to data ports, given as ``host:port``. Both calls return once the other end has accepted.

    ``peer`` is the identity that the server must prove (see ``cluster.security.trust``). Both raise ``Unreachable`` if
    there is no answer in time, and ``StaleEpoch`` if no stage of that epoch is loaded there.
    """

    def feed(self, address: str, epoch: int, lost: Lost, line: Line = Line.URGENT, peer: str = WORKER) -> Sender: ...

    def pull(
        self,
        address: str,
        epoch: int,
        received: Received,
        lost: Lost,
        line: Line = Line.URGENT,
        peer: str = WORKER,
        reader: int = 0,
    ) -> Subscription:
        """Read a stage's frames, as this one of its readers: each has a queue of its own."""


class Outbox:
    """A queue of messages of one epoch for one reader.

    It is bounded in number and in bytes, but one message of any size may always wait. A message that exceeds the
    bounds closes the outbox, sets ``overflowed`` and ends the stream with an error. A closed outbox ignores messages.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        # A SimpleQueue wakes its reader in half the time of a Queue. It has no bounds, so ``send`` enforces them.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sent = self._read = 0
        """Counters of bytes. Only one thread writes each of them."""
        self._taken = self._closed = False
        self.overflowed = False

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the messages that have not been read yet."""
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
        """Claim the outbox for its one reader. Return False if it is taken."""
        was_taken = self._taken
        self._taken = True
        return not was_taken

    def close(self) -> None:
        """End the reader after the waiting messages, or at once if the outbox has overflowed."""
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
        """Yield messages until the outbox closes. Block between them."""
        while (message := self._queue.get()) is not None and not self.overflowed:
            self._read += len(message)
            yield message
