"""One standby as its leader sees it: which updates it was sent, and which of them it has stored."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cluster.core.errors import Busy
from cluster.core.leadership import CoordinatorName
from cluster.core.replication_limits import MAX_UNSTORED_BYTES, PIECE_BYTES
from cluster.v1 import leader_pb2 as pb

__all__ = ["Follower"]


@dataclass(slots=True)
class _Sent:
    """An update that is not stored yet: its number and size, when it came, and the batch whose records it ends."""

    number: int
    nbytes: int
    at: float
    batch: int | None = None


class Follower:
    """A standby with its copy ``replica``, on one event loop. ``clock`` returns seconds, and counts sleep."""

    def __init__(self, name: CoordinatorName, replica: str, clock: Callable[[], float]) -> None:
        self.name, self.replica = name, replica
        self.has_journal = False
        """Whether records are sent, which follow a whole journal."""
        self.is_prepared = False
        """Whether it has read what it needs to lead."""
        self.reached = 0
        """The last batch of records of which it has stored all."""
        self._clock = clock
        self._unsent, self._unstored = deque[pb.FollowResponse](), deque[_Sent]()
        self._number = self._nbytes = 0
        self._complete_at = 0
        """The number of the update that completed its copy; 0 before."""
        self._stored = 0
        self._arrived = asyncio.Event()
        self._end: Busy | None = None
        self._closed = False

    @property
    def is_complete(self) -> bool:
        """Whether it has stored a whole copy."""
        return 0 < self._complete_at <= self._stored

    @property
    def newest(self) -> int:
        """The number of the last update that it was sent."""
        return self._number

    def has_stored(self, number: int) -> bool:
        """Return whether it has stored all updates up to this number."""
        return self._stored >= number

    @property
    def behind(self) -> int:
        """How many updates it has not stored yet."""
        return len(self._unstored)

    @property
    def silent_s(self) -> float:
        """For how long it has not stored the next update; 0 if there is none."""
        return self._clock() - self._unstored[0].at if self._unstored else 0.0

    def put(self, update: pb.FollowResponse) -> None:
        """Send an update. One that does not store what it is sent is disconnected."""
        if self._end or self._closed:
            return
        self._number += 1
        update.number = self._number
        self._nbytes += update.ByteSize()
        if self._nbytes > MAX_UNSTORED_BYTES:
            self._unsent.clear()
            self._end = Busy("the standby does not store what it is sent; it starts again from a new copy")
        else:
            self._unsent.append(update)
            self._unstored.append(_Sent(self._number, update.ByteSize(), self._clock()))
        self._arrived.set()

    def put_journal(self, content: bytes) -> None:
        """Send a whole journal, in pieces."""
        starts = range(0, max(len(content), 1), PIECE_BYTES)
        for start in starts:
            piece = pb.JournalPiece(
                content=content[start : start + PIECE_BYTES], first=start == 0, last=start == starts[-1]
            )
            self.put(pb.FollowResponse(journal=piece))

    def complete(self) -> None:
        """Tell it that its copy is complete."""
        self.put(pb.FollowResponse(complete=pb.ReplicaComplete()))
        self._complete_at = self._number

    def reach(self, batch: int) -> None:
        """Take note that all records up to this batch were sent; ignored once nothing is sent any more."""
        if self._end or self._closed:
            return
        if self._unstored:
            self._unstored[-1].batch = batch
        else:
            self.reached = max(self.reached, batch)

    def acknowledge(self, number: int) -> None:
        """Take note that the standby has stored all updates up to this number."""
        while self._unstored and self._unstored[0].number <= number:
            sent = self._unstored.popleft()
            self._nbytes -= sent.nbytes
            self._stored = sent.number
            if sent.batch is not None:
                self.reached = max(self.reached, sent.batch)

    def close(self) -> None:
        """Send nothing after what was put."""
        self._closed = True
        self._arrived.set()

    async def updates(self) -> AsyncIterator[pb.FollowResponse]:
        """Yield the updates, up to the last one before ``close``. Raises ``Busy`` if they were not stored."""
        while True:
            while self._unsent:
                yield self._unsent.popleft()
            if self._end:
                raise self._end
            if self._closed:
                return
            self._arrived.clear()
            await self._arrived.wait()
