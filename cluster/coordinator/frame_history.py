"""Keep the last frames that came back, so that the way of an answer through the stages can be shown.

The engine loop's thread writes. Any thread may take a copy and build a trace of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from cluster.core.frames import Frame, StageTiming
from cluster.core.plan import PlannedStage
from cluster.core.request_trace import RequestTrace, TracedEpoch, TracedFrame, TracedStage
from cluster.scheduler.outcome import Outcome, Produced

KEPT_TIMINGS: Final = 1 << 16
"""Times of a stage for a frame: 17 MB for four stages and 37 MB for one, and minutes at 100 frames a second."""
KEPT_REQUESTS: Final = 4096
KEPT_EPOCHS: Final = 32


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """A request that was accepted, and has ended if ``ended_at`` is not None."""

    id: str
    client: str
    prompt_tokens: int
    accepted_at: float
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Returned:
    epoch: int
    lane: int
    number: int
    sent_at: float
    returned_at: float
    void: bool
    prompt_tokens: int
    rows: int
    timings: tuple[StageTiming, ...]
    requests: tuple[str, ...]
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class FramesCopy:
    """A copy of what was kept at one moment."""

    requests: tuple[TracedRequest, ...]
    epochs: tuple[TracedEpoch, ...]
    frames: tuple[_Returned, ...]
    forgotten_at: float
    """When the newest of the forgotten frames came back; minus infinity if there is none."""

    def find(self, request_id: str, client: str | None) -> TracedRequest | None:
        """Return a request; None if it is not known, or another client's. See ``trace_request``."""
        seen = [
            one
            for one in self.requests
            if (client is None or one.client == client) and (one.id == request_id if request_id else one.client)
        ]
        return seen[-1] if seen else None

    def trace(self, request: TracedRequest) -> RequestTrace:
        """Return the trace of one of its requests."""
        began, end = request.accepted_at, request.ended_at
        frames = [f for f in self.frames if f.returned_at >= began and (end is None or f.sent_at <= end)]
        epochs = {frame.epoch for frame in frames}
        return RequestTrace(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            ended_seconds=None if end is None else end - began,
            complete=self.forgotten_at < began,
            epochs=tuple(e for e in self.epochs if e.epoch in epochs),
            frames=tuple(_describe(f, request) for f in frames),
        )


def trace_request(copies: Sequence[FramesCopy], request_id: str, client: str | None) -> RequestTrace | None:
    """Return the trace of a request, from the copies of several loops; None if it is not known, or another client's.

    ``client`` None may see each request. "" as the id means the newest one that the client may see, and that a client
    sent: the coordinator's own have none. A request that moved to another loop is traced there.
    """
    found = [(copy, request) for copy in copies if (request := copy.find(request_id, client))]
    if not found:
        return None
    copy, request = max(found, key=lambda one: one[1].accepted_at)
    return copy.trace(request)


class FrameHistory:
    """The last frames, with the requests and epochs that they belong to. Times are of the engine loop's clock."""

    def __init__(self, kept_timings: int = KEPT_TIMINGS) -> None:
        self._kept_timings = kept_timings
        self._frames: deque[_Returned] = deque()
        self._timings = 0
        self._forgotten_at = float("-inf")
        self._epochs: deque[TracedEpoch] = deque(maxlen=KEPT_EPOCHS)
        self._requests: OrderedDict[str, TracedRequest] = OrderedDict()

    def begin_epoch(self, epoch: int, stages: Sequence[PlannedStage]) -> None:
        """Note the stages that compute the next frames."""
        self._epochs.append(TracedEpoch(epoch, tuple(TracedStage(s.worker, s.layers) for s in stages)))

    def accept(self, request_id: str, client: str, prompt_tokens: int, now: float) -> None:
        """Note a request. One with the same id is forgotten."""
        self._requests.pop(request_id, None)
        self._requests[request_id] = TracedRequest(request_id, client, prompt_tokens, now)
        if len(self._requests) > KEPT_REQUESTS:
            self._requests.popitem(last=False)

    def end(self, request_id: str, now: float) -> None:
        """Note that a request has ended."""
        if request := self._requests.get(request_id):
            self._requests[request_id] = replace(request, ended_at=now)

    def add(self, frame: Frame, outcome: Outcome, now: float) -> None:
        """Note a frame that came back, and forget the oldest ones beyond what is kept."""
        tokens = tuple((e.request_id, e.index) for e in outcome.events if isinstance(e, Produced) and e.counts)
        self._frames.append(
            _Returned(
                epoch=frame.epoch,
                lane=frame.lane,
                number=frame.number,
                sent_at=outcome.sent_at,
                returned_at=now,
                void=frame.void,
                prompt_tokens=outcome.prefills,
                rows=outcome.rows,
                timings=outcome.timings,
                requests=outcome.request_ids,
                tokens=tokens,
            )
        )
        self._timings += max(1, len(outcome.timings))
        while self._timings > self._kept_timings:
            oldest = self._frames.popleft()
            self._timings -= max(1, len(oldest.timings))
            self._forgotten_at = oldest.returned_at

    def copy(self) -> FramesCopy:
        """Return a copy. Called on the loop's thread."""
        return FramesCopy(tuple(self._requests.values()), tuple(self._epochs), tuple(self._frames), self._forgotten_at)


def _describe(frame: _Returned, request: TracedRequest) -> TracedFrame:
    return TracedFrame(
        epoch=frame.epoch,
        lane=frame.lane,
        number=frame.number,
        sent_seconds=frame.sent_at - request.accepted_at,
        returned_seconds=frame.returned_at - request.accepted_at,
        own=request.id in frame.requests,
        void=frame.void,
        prompt_tokens=frame.prompt_tokens,
        rows=frame.rows,
        timings=frame.timings,
        tokens=tuple(index for request_id, index in frame.tokens if request_id == request.id),
    )
