"""The ring: the data streams of one epoch as the coordinator holds them.

It feeds stage 0, pulls from the last stage, and carries the hops that are relayed. Who feeds whom is told; it refuses
to know what a frame says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.transport.streams import Dialer, Received, Sender, Subscription
from cluster.types import Route

StageLost = Callable[[str, str], None]
"""Told a worker's name and a sentence when one of the coordinator's streams with it breaks."""


@dataclass(frozen=True, slots=True)
class RingStage:
    """A stage's worker, its data address, and how its input arrives (stage 0's is always fed)."""

    worker: str
    address: str
    inlet: Route


class Ring:
    """Open streams to every stage that the coordinator talks to. Raises ``Unreachable`` or ``StaleEpoch``."""

    def __init__(
        self, dialer: Dialer, epoch: int, stages: Sequence[RingStage], received: Received, lost: StageLost
    ) -> None:
        self._streams: list[Sender | Subscription] = []
        try:
            self._first = self._open(dialer, epoch, stages, received, lost)
        except BaseException:
            self.close()
            raise

    def _open(
        self, dialer: Dialer, epoch: int, stages: Sequence[RingStage], received: Received, lost: StageLost
    ) -> Sender:
        sink = received
        for i, stage in reversed(list(enumerate(stages))):
            gone = partial(lost, stage.worker)
            if i == len(stages) - 1 or stages[i + 1].inlet is Route.RELAY:
                self._streams.append(dialer.pull(stage.address, epoch, sink, gone))
            if i == 0 or stage.inlet is Route.RELAY:
                feed = dialer.feed(stage.address, epoch, gone)
                self._streams.append(feed)
                sink = feed.send
        return feed

    def send(self, message: bytes) -> None:
        """Send a frame to stage 0; never blocks."""
        self._first.send(message)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
