"""The scheduler: requests and lanes in, the next frames out.

A request takes a free lane, or waits in a bounded first-come queue. Its prompt goes out as a row of prefill frames
that do not wait for each other, at most ``window`` of them in the ring at once; decode frames go before prefill
frames. Each lane holds one sequence, so lanes overlap in the stages while no token depends on who else is there.

Frames come back in the order in which they were written. Every frame that is written comes back, or the ring is lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.errors import BadFrame, Busy, InvalidRequest, RequestNotFound
from cluster.frames import Compute, Edit, Frame, Join, Leave, Sample, Step
from cluster.limits import MAX_QUEUE, PREFILL_CHUNK, RETRY_AFTER_S
from cluster.scheduler.outcome import Failed, Outcome, Produced
from cluster.scheduler.sequence import Phase, Sequence
from cluster.types import FinishReason, Request


@dataclass(frozen=True, slots=True)
class _Flight:
    """A frame that is in the ring: whose it is, and how many prompt tokens it prefills."""

    number: int
    sequence: int
    prefills: int
    sent_at: float


class Scheduler:
    """One epoch's schedule. ``lanes`` sequences live at once; ``eos`` are the token ids that end an answer."""

    def __init__(
        self,
        epoch: int,
        lanes: int,
        window: int,
        eos: frozenset[int],
        chunk: int = PREFILL_CHUNK,
        queue: int = MAX_QUEUE,
    ) -> None:
        self._epoch, self._window, self._eos, self._chunk, self._most_waiting = epoch, window, eos, chunk, queue
        self._free_lanes = deque(range(lanes))
        self._waiting: deque[Sequence] = deque()
        self._live: dict[int, Sequence] = {}
        self._by_request: dict[str, Sequence] = {}
        self._flights: deque[_Flight] = deque()
        self._edits: deque[Edit] = deque()
        self._frames_written = 0
        self._sequences_seen = 0

    # What can be asked

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Every live request in the order of arrival, the waiting ones last."""
        return (*self._live.values(), *self._waiting)

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def oldest_sent_at(self) -> float | None:
        """When the frame that has been longest in the ring was written; None where the ring is empty."""
        return self._flights[0].sent_at if self._flights else None

    # What can happen

    def submit(self, request: Request) -> None:
        """Accept a request. Raises ``Busy`` where the queue is full, ``InvalidRequest`` for an id that is taken."""
        if request.id in self._by_request:
            raise InvalidRequest(f"a request with the id {request.id} is already live", field="request_id")
        if not self._free_lanes and len(self._waiting) >= self._most_waiting:
            raise Busy(
                f"{len(self._live)} requests are being answered and {len(self._waiting)} wait; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self._sequences_seen += 1
        sequence = Sequence(request, self._sequences_seen)
        self._by_request[request.id] = sequence
        self._waiting.append(sequence)
        self._fill_lanes()

    def end(self, request_id: str) -> Sequence:
        """Take a request out wherever it is; its caches go with the next frame. Raises ``RequestNotFound``."""
        sequence = self._by_request.pop(request_id, None)
        if sequence is None:
            raise RequestNotFound(f"no live request has the id {request_id}")
        if sequence.phase is Phase.QUEUED:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)
        return sequence

    def returned(self, frame: Frame) -> Outcome:
        """Account for a frame that the last stage sent back. Raises ``BadFrame`` where it is not the one due."""
        if not self._flights or frame.number != self._flights[0].number or frame.epoch != self._epoch:
            raise BadFrame(f"frame {frame.number} of epoch {frame.epoch} came back out of turn")
        flight = self._flights.popleft()
        sequence = self._live.get(flight.sequence)
        if sequence is None:
            return Outcome("", frame.timings, flight.sent_at)
        sequence.prefilled += flight.prefills
        event = self._event(sequence, frame)
        return Outcome(sequence.request.id, frame.timings, flight.sent_at, event)

    def next_frames(self, now: float) -> list[Frame]:
        """Every frame that can be written now, decode before prefill; edits ride on the first of them."""
        frames = self._decodes(now)
        while self._prefills_in_flight() < self._window and (sequence := self._neediest()):
            frames.append(self._prefill(sequence, now))
        frames += self._decodes(now)
        if self._edits:
            frames.append(self._write(0, -1, 0, None, now))
        return frames

    # How it is done

    def _fill_lanes(self) -> None:
        while self._free_lanes and self._waiting:
            sequence = self._waiting.popleft()
            sequence.lane = self._free_lanes.popleft()
            self._live[sequence.id] = sequence
            request = sequence.request
            self._edits.append(Join(sequence.id, len(request.prompt), request.sampling))
            if not sequence.unsent:
                sequence.next_token = request.prompt[-1]

    def _leave(self, sequence: Sequence) -> None:
        del self._live[sequence.id]
        self._free_lanes.append(sequence.lane)
        self._edits.append(Leave(sequence.id))
        self._fill_lanes()

    def _event(self, sequence: Sequence, frame: Frame) -> Produced | Failed | None:
        if frame.error:
            self.end(sequence.request.id)
            return Failed(sequence.request.id, frame.error)
        if not frame.samples:
            return None
        return self._produced(sequence, frame.samples[0])

    def _produced(self, sequence: Sequence, sample: Sample) -> Produced:
        request, index = sequence.request, sequence.produced
        ended = sample.token in self._eos and not request.ignore_eos
        finish = FinishReason.STOP if ended else None
        if not ended:
            sequence.produced += 1
            sequence.next_token = sample.token
            finish = FinishReason.LENGTH if sequence.produced >= request.max_tokens else None
        if finish:
            self.end(request.id)
        return Produced(request.id, index, sample, finish, counts=not ended)

    def _prefills_in_flight(self) -> int:
        return sum(1 for f in self._flights if f.prefills)

    def _decodes(self, now: float) -> list[Frame]:
        return [self._decode(s, now) for s in self._live.values() if s.next_token is not None]

    def _neediest(self) -> Sequence | None:
        """The sequence whose prompt has gone out least: several prompts share prefill by turns."""
        return min((s for s in self._live.values() if s.unsent), key=lambda s: (s.sent, s.id), default=None)

    def _prefill(self, sequence: Sequence, now: float) -> Frame:
        start = sequence.sent
        tokens = sequence.request.prompt[start : start + min(self._chunk, sequence.unsent)]
        sequence.sent += len(tokens)
        if not sequence.unsent:
            sequence.next_token = sequence.request.prompt[-1]
        return self._write(sequence.lane, sequence.id, len(tokens), Compute.PREFILL, now, tokens)

    def _decode(self, sequence: Sequence, now: float) -> Frame:
        assert sequence.next_token is not None
        token, sequence.next_token = sequence.next_token, None
        return self._write(sequence.lane, sequence.id, 0, Compute.DECODE, now, (token,))

    def _write(
        self, lane: int, sequence: int, prefills: int, compute: Compute | None, now: float, tokens: tuple[int, ...] = ()
    ) -> Frame:
        number = self._frames_written
        self._frames_written += 1
        self._flights.append(_Flight(number, sequence, prefills, now))
        edits, self._edits = tuple(self._edits), deque()
        step = Step(compute, (sequence,), (tokens,)) if compute is not None else None
        return Frame(self._epoch, lane, number, edits, step)
