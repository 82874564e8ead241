"""Hold the coordinator's data streams of one epoch.

The ring feeds stage 0, pulls from the last stage, and relays the hops that have no direct link. A relayed hop uses both
lines, urgent and bulk (see ``transport.streams.Line``). The feed of stage 0 and the pull use only the urgent line,
since tokens and samples are small and always urgent. The caller decides who feeds whom. This module refuses to know
what a frame contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from cluster.core.errors import Unreachable
from cluster.core.plan import Link, Route
from cluster.security.trust import WORKER
from cluster.transport.streams import Dialer, Line, Received, Sender, Subscription

StageLost = Callable[[int, str, str], None]
"""Called with the epoch, a worker's name and a sentence when one of the coordinator's streams to it breaks."""


@dataclass(frozen=True, slots=True)
class RingStage:
    """A stage's worker, data address, input route (stage 0 is always fed), expected TLS party, and the measured link.

    The link is the one over which the stage pulls; None if it is relayed or was not measured. ``rank`` is that of the
    worker in its group; it is also which of the previous stage's readers it is.
    """

    worker: str
    address: str
    input_route: Route
    party: str = WORKER
    link: Link | None = None
    rank: int = 0


class Ring:
    """Open streams to every stage that the coordinator talks to. The ranks of a group follow one another in ``stages``.

    All ranks of the first stage are fed. A rank that sends nothing on is watched by a stream of its own. Raises
    ``Unreachable``, which names the worker, or ``StaleEpoch``.
    """

    def __init__(
        self, dialer: Dialer, epoch: int, stages: Sequence[RingStage], received: Received, lost: StageLost
    ) -> None:
        self._streams: list[Sender | Subscription] = []
        try:
            self._feeds = self._open(dialer, epoch, stages, received, lost)
        except BaseException:
            self.close()
            raise

    def _open(
        self, dialer: Dialer, epoch: int, stages: Sequence[RingStage], received: Received, lost: StageLost
    ) -> list[Sender]:
        """Open all streams and return the feeds of stage 0."""
        groups = _group_ranks(stages)
        for (before, *_), after in pairwise(groups):
            for rank in after:
                if rank.input_route is Route.RELAY:
                    self._relay(dialer, epoch, before, rank, lost)
        for stage in stages:
            if stage.rank:
                self._streams.append(pull_stage(dialer, epoch, stage, _ignore, lost))
        self._streams.append(pull_stage(dialer, epoch, groups[-1][0], received, lost))
        feeds = []
        for stage in groups[0]:
            feeds.append(feed_stage(dialer, epoch, stage, lost))
            self._streams.append(feeds[-1])
        return feeds

    def _relay(self, dialer: Dialer, epoch: int, before: RingStage, after: RingStage, lost: StageLost) -> None:
        for line in Line:
            feed = feed_stage(dialer, epoch, after, lost, line)
            self._streams.append(feed)
            self._streams.append(pull_stage(dialer, epoch, before, feed.send, lost, line, after.rank))

    def send(self, message: bytes) -> None:
        """Send a frame to stage 0; never blocks."""
        for feed in self._feeds:
            feed.send(message)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def _group_ranks(stages: Sequence[RingStage]) -> list[list[RingStage]]:
    """Return the ranks of each stage."""
    groups: list[list[RingStage]] = []
    for stage in stages:
        if stage.rank == 0:
            groups.append([])
        groups[-1].append(stage)
    return groups


def _ignore(message: bytes) -> None:
    """Ignore a message: a rank other than 0 sends nothing, but its stream ends if it is lost."""


def feed_stage(dialer: Dialer, epoch: int, stage: RingStage, lost: StageLost, line: Line = Line.URGENT) -> Sender:
    """Open a stream to a stage. Raises as ``Ring``."""
    with _map_errors(stage):
        return dialer.feed(stage.address, epoch, partial(lost, epoch, stage.worker), line, stage.party)


def pull_stage(
    dialer: Dialer,
    epoch: int,
    stage: RingStage,
    received: Received,
    lost: StageLost,
    line: Line = Line.URGENT,
    reader: int = 0,
) -> Subscription:
    """Open a stream from a stage. Raises as ``Ring``."""
    with _map_errors(stage):
        return dialer.pull(
            stage.address, epoch, received, partial(lost, epoch, stage.worker), line, stage.party, reader
        )


@contextmanager
def _map_errors(stage: RingStage) -> Iterator[None]:
    """Name the worker in ``Unreachable``."""
    try:
        yield
    except Unreachable as e:
        raise Unreachable(f"worker {stage.worker}: {e.sentence}", worker=stage.worker) from e
