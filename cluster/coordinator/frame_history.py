"""Keep the last frames that came back, so that the way of an answer through the stages can be shown.

The engine loop's thread writes. Any thread may take a copy and build a trace of it. A frame is kept as bytes: as
objects it would take several times the memory, and slow each garbage collection down.
"""

from __future__ import annotations

import itertools
import sys
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import msgpack

from cluster.core.frames import Frame, StageTiming
from cluster.core.plan import PlannedStage
from cluster.core.request_trace import RequestTrace, TracedEpoch, TracedFrame, TracedStage
from cluster.scheduler.outcome import Outcome, Produced

KEPT_BYTES: Final = 8 << 20
"""Memory for frames: 90,000 of one request over two stages, or 18,000 of 64 requests."""
KEPT_REQUESTS: Final = 4096
KEPT_EPOCHS: Final = 32


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """A request that was accepted, and has ended if ``ended_at`` is not None."""

    serial: int
    """Its number among all requests of this history: frames name it so, since ids are long."""
    id: str
    client: str
    prompt_tokens: int
    accepted_at: float
    ended_at: float | None = None


class _Returned(NamedTuple):
    """A frame that came back. ``requests`` are serial numbers, ``tokens`` pairs of one and a token's index.

    ``timings`` are the fields of each ``StageTiming``.
    """

    returned_at: float
    sent_at: float
    epoch: int
    lane: int
    number: int
    void: bool
    prompt_tokens: int
    rows: int
    timings: tuple[tuple[int, int, int, int], ...]
    requests: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...]


def _pack(frame: _Returned) -> bytes:
    return bytes(msgpack.packb(frame))


def _unpack(packed: bytes) -> _Returned:
    return _Returned(*msgpack.unpackb(packed, use_list=False))


@dataclass(frozen=True, slots=True)
class FramesCopy:
    """A copy of what was kept at one moment. ``frames`` are packed, in the order in which they came back."""

    requests: tuple[TracedRequest, ...]
    epochs: tuple[TracedEpoch, ...]
    frames: tuple[bytes, ...]
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
        first = bisect_left(self.frames, began, key=lambda packed: _unpack(packed).returned_at)
        frames = [f for f in map(_unpack, self.frames[first:]) if end is None or f.sent_at <= end]
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

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._forgotten_at = float("-inf")
        self._epochs: deque[TracedEpoch] = deque(maxlen=KEPT_EPOCHS)
        self._requests: OrderedDict[str, TracedRequest] = OrderedDict()
        self._serials = itertools.count()

    def begin_epoch(self, epoch: int, stages: Sequence[PlannedStage]) -> None:
        """Note the stages that compute the next frames."""
        self._epochs.append(TracedEpoch(epoch, tuple(TracedStage(s.worker, s.layers) for s in stages)))

    def accept(self, request_id: str, client: str, prompt_tokens: int, now: float) -> None:
        """Note a request. One with the same id is forgotten."""
        self._requests.pop(request_id, None)
        self._requests[request_id] = TracedRequest(next(self._serials), request_id, client, prompt_tokens, now)
        if len(self._requests) > KEPT_REQUESTS:
            self._requests.popitem(last=False)

    def end(self, request_id: str, now: float) -> None:
        """Note that a request has ended."""
        if request := self._requests.get(request_id):
            self._requests[request_id] = replace(request, ended_at=now)

    def add(self, frame: Frame, outcome: Outcome, now: float) -> None:
        """Note a frame that came back, and forget the oldest ones beyond what is kept.

        Requests that were not accepted, or are forgotten, are left out.
        """
        known = self._requests
        produced = (e for e in outcome.events if isinstance(e, Produced) and e.counts)
        returned = _Returned(
            returned_at=now,
            sent_at=outcome.sent_at,
            epoch=frame.epoch,
            lane=frame.lane,
            number=frame.number,
            void=frame.void,
            prompt_tokens=outcome.prefills,
            rows=outcome.rows,
            timings=tuple((t.stage, t.wait_us, t.compute_us, t.pack_us) for t in outcome.timings),
            requests=tuple(known[one].serial for one in outcome.request_ids if one in known),
            tokens=tuple((known[e.request_id].serial, e.index) for e in produced if e.request_id in known),
        )
        packed = _pack(returned)
        self._frames.append(packed)
        self._bytes += sys.getsizeof(packed)
        while self._bytes > self._kept_bytes:
            oldest = self._frames.popleft()
            self._bytes -= sys.getsizeof(oldest)
            self._forgotten_at = _unpack(oldest).returned_at

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
        own=request.serial in frame.requests,
        void=frame.void,
        prompt_tokens=frame.prompt_tokens,
        rows=frame.rows,
        timings=tuple(StageTiming(*one) for one in frame.timings),
        tokens=tuple(index for serial, index in frame.tokens if serial == request.serial),
    )
