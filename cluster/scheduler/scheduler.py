"""The scheduler: requests and lanes in, the next frames out.

A request waits its turn, enters the emptiest lane once every stage has room for its worst case, starts from the
longest kept prefix, and sends the rest of its prompt as a row of prefill frames that do not wait for each other.
Decode frames, one a lane, go before prefill frames; while others decode, a prefill frame is no longer than the pace
allows, and each of their lanes goes once before the next one.

Frames of one sequence come back in the order in which they were written; a decode frame may overtake prefill frames of
others (``cluster.scheduler.reordering``). Every frame that is written comes back, or the ring is lost.
"""

from __future__ import annotations

from cluster.core.errors import BadFrame, Busy, InvalidRequest, PromptTooLong, RequestNotFound
from cluster.core.frames import Compute, Drop, Frame, Join, Leave, Restore, Sample, Save, SequenceFailure, Step, Trim
from cluster.core.limits import RETRY_AFTER_S
from cluster.core.request import FinishReason, Request
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.fair_queue import FairQueue
from cluster.scheduler.frame_writer import FrameWriter
from cluster.scheduler.in_flight import InFlightFrame
from cluster.scheduler.kv_cost import Cost, fits, lane_cost, total
from cluster.scheduler.lanes import LaneAssignment
from cluster.scheduler.outcome import Outcome, Produced, Refused, SampleFailed
from cluster.scheduler.prefill_budget import PrefillBudget
from cluster.scheduler.prefixes import Prefixes
from cluster.scheduler.sample_forks import copies
from cluster.scheduler.sequence import Phase, Sequence


class Scheduler:
    """The schedule of one model, over as many epochs as it takes. ``eos`` are the token ids that end an answer."""

    def __init__(self, epoch: int, capacity: Capacity, eos: frozenset[int]) -> None:
        self._eos = eos
        self._waiting = FairQueue(capacity.queue)
        self._by_request: dict[str, Sequence] = {}
        self._sequences_seen = 0
        self._open(epoch, capacity)

    def _open(self, epoch: int, capacity: Capacity) -> None:
        self._epoch, self._capacity = epoch, capacity
        self._lanes = LaneAssignment(capacity.lanes, capacity.rows)
        self._prefixes = Prefixes(capacity.prefix_budget, trimmable=capacity.trimmable)
        self._pacing = PrefillBudget(capacity.chunk, len(capacity.budget), capacity.max_step_ms)
        self._by_id: dict[int, Sequence] = {}
        self._log = FrameWriter(epoch)
        self._flights, self._edits = self._log.flights, self._log.edits
        self._lanes_since_prefill: set[int] = set()

    # What can be asked

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Every live request in the order of arrival, the waiting ones last."""
        return (*sorted(self._lanes, key=lambda s: s.id), *self._waiting)

    @property
    def lane_sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self._lanes.members))

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def reserved(self) -> Cost:
        """Bytes of each stage's caches that live sequences may come to take."""
        return self._cost(self._lanes.members)

    @property
    def prefixes(self) -> Prefixes:
        return self._prefixes

    def oldest(self) -> tuple[float, int] | None:
        return self._flights.oldest()

    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request."""
        return min((d for s in self._by_request.values() if (d := s.request.deadline) is not None), default=None)

    def overdue(self, now: float) -> list[str]:
        """Requests whose deadline has passed, wherever they are."""
        return [i for i, s in self._by_request.items() if s.request.deadline is not None and s.request.deadline <= now]

    # What can happen

    def submit(self, *requests: Request, said: tuple[tuple[int, ...], ...] = ()) -> None:
        """Accept requests, all or none. Several are samples of one prompt, which the first of them prefills for all,
        unless the answers have begun with what they have ``said`` already.

        Raises ``Busy`` where the queue is full, ``PromptTooLong`` for one that can never fit, ``InvalidRequest`` for
        an id that is taken.
        """
        for request in requests:
            if request.id in self._by_request:
                raise InvalidRequest(f"a request with the id {request.id} is already live", field="request_id")
            if why := self._capacity.never_fits(len(request.prompt) + request.max_tokens):
                raise PromptTooLong(why, field="max_tokens")
        if not self._waiting.has_room(len(requests)):
            raise Busy(
                f"{len(self._lanes)} requests are being answered and {len(self._waiting)} wait; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        leader: Sequence | None = None
        for request, begun in zip(requests, said or ((),) * len(requests), strict=True):
            self._sequences_seen += 1
            sequence = Sequence(request, self._sequences_seen, leader=leader, said=list(begun))
            leader = leader or (None if said else sequence)
            self._by_request[request.id] = sequence
            self._waiting.add(sequence)
        self._admit()

    def begin_epoch(self, epoch: int, capacity: Capacity) -> tuple[Refused, ...]:
        """Other stages are ready, which hold nothing: whoever had a lane is prefilled anew with all it has said, before
        those that wait. Requests that these stages can never hold are taken out and returned.
        """
        lost = sorted(self._lanes, key=lambda s: s.id)
        for sequence in self._by_request.values():
            sequence.begin_anew()
        self._waiting.put_back(lost)
        self._open(epoch, capacity)
        refused = [Refused(s.request.id, why) for s in self._waiting if (why := capacity.never_fits(s.reserved))]
        for refusal in refused:
            self._waiting.remove(self._by_request.pop(refusal.request_id))
        self._admit()
        return tuple(refused)

    def end(self, request_id: str) -> Sequence:
        """Take a request out, if it is there; its caches are kept or freed. Raises ``RequestNotFound``."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            raise RequestNotFound(f"no live request has the id {request_id}")
        self._remove(sequence, keep=True)
        return sequence

    def on_frame(self, frame: Frame) -> Outcome:
        """Account for a frame that the last stage sent back. Raises ``BadFrame`` where that cannot be."""
        if frame.epoch != self._epoch:
            raise BadFrame(f"a frame of epoch {frame.epoch} came back in epoch {self._epoch}")
        flight = self._flights.land(frame)
        if flight.compute is Compute.DECODE:
            self._lanes.end(flight.lane)
        if not frame.error:
            self._pacing.learn(flight.compute, flight.prefills, frame.timings)
        live = [s for i in flight.sequences if (s := self._by_id.get(i))]
        for sequence in live:
            sequence.prefilled += flight.prefills
        events = self._events(live, frame)
        self._let_go(flight, frame)
        rows = len(flight.sequences) if flight.compute is Compute.DECODE and not frame.error else 0
        context = sum(s.prefilled + s.produced for s in live) // max(len(live), 1)
        took = rows, context, flight.prefills
        return Outcome(tuple(s.request.id for s in live), frame.timings, flight.sent_at, events, *took)

    def next_frames(self, now: float) -> list[Frame]:
        """Every frame that can be written now, decode before prefill; edits ride on the first of them."""
        self._lanes.rebalance(lambda members: fits(self._cost(members), self._room()))
        frames = [*self._log.heavy(now), *self._decodes(now)]
        while self._flights.prefills < self._capacity.window and (sequence := self._prefillable()):
            frames.append(self._prefill(sequence, now))
            frames += self._decodes(now)
        return frames + self._log.rest(now)

    # Memory and lanes

    def _cost(self, members: list[list[Sequence]]) -> Cost:
        lanes = [*members, *([s] for s in self._flights.leaving)]
        costs = (lane_cost([s.reserved for s in lane], self._capacity.cost_of) for lane in lanes if lane)
        return total(costs, len(self._capacity.budget))

    def _room(self) -> Cost:
        """Bytes that live sequences may take beside what prefixes take."""
        return tuple(b - p for b, p in zip(self._capacity.budget, self._prefixes.used, strict=True))

    def _admit(self) -> None:
        """Let in whose turn it is, while memory lasts; nobody passes one who waits for memory."""
        while (sequence := self._waiting.first()) and self._make_room(sequence):
            self._waiting.take()
            self._lanes.enter(sequence)
            self._by_id[sequence.id] = sequence
            self._join(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """Drop prefixes, the oldest first, as far as a sequence needs; False where even all would not do."""
        members = self._lanes.with_one_more(sequence)
        if members is None:
            return False
        cost, budget = self._cost(members), self._capacity.budget
        if not fits(cost, budget):
            return False
        room = tuple(b - c for b, c in zip(budget, cost, strict=True))
        self._prefixes.find(sequence.request.client, sequence.base)  # what it will start from goes last
        self._edits += map(Drop, self._prefixes.shrink_to(room))
        return True

    def _join(self, sequence: Sequence) -> None:
        if sequence.follows:
            return
        request, sequence.joined, sequence.served = sequence.request, True, self._log.written
        self._edits.append(Join(sequence.id, len(request.prompt), request.sampling))
        if match := self._prefixes.find(request.client, sequence.base):
            self._edits.append(Restore(sequence.id, match.entry))
            if not match.whole:
                self._edits.append(Trim(sequence.id, match.length))
            sequence.fed.extend(sequence.base[: match.length])
            sequence.cached = sequence.prefilled = match.length
        self._finish_prompt(sequence)

    def _finish_prompt(self, leader: Sequence) -> None:
        """Once all of a prompt is on its way, its decode may follow, and other samples of it start from a copy."""
        if leader.unsent:
            return
        leader.next_token = leader.base[-1]
        followers = [s for s in self._lanes if s.leader is leader and not s.joined]
        if followers:
            self._edits += copies(leader, followers, self._prefixes.passing())
        if leader.request.samples > 1 and any(s.leader is leader for s in self._waiting):
            self._keep(leader)

    def _hand_over(self, leader: Sequence) -> None:
        """A sample has gone: the next one that still waits for its prompt prefills it for the others."""
        heirs = [s for s in self._by_request.values() if s.leader is leader and not s.joined]
        if not heirs:
            return
        heir, heirs[0].leader = heirs[0], None
        for other in heirs[1:]:
            other.leader = heir
        if heir.phase is not Phase.QUEUED:
            self._join(heir)

    def _remove(self, sequence: Sequence, *, keep: bool) -> None:
        del self._by_request[sequence.request.id]
        if sequence.phase is Phase.QUEUED:
            self._waiting.remove(sequence)
        else:
            del self._by_id[sequence.id]
            self._lanes.leave(sequence)
            sequence.broken = not keep
            if not self._flights.hold(sequence):
                self._leave(sequence)
        if sequence.request.samples > 1:
            self._hand_over(sequence)
        self._admit()

    def _leave(self, sequence: Sequence) -> None:
        """Nothing of it is in the ring: the stages hold the same of it, unless a step of it failed."""
        if len(sequence.fed) > sequence.cached and not sequence.broken:
            self._keep(sequence)
        if sequence.joined:
            self._edits.append(Leave(sequence.id))

    def _let_go(self, flight: InFlightFrame, frame: Frame) -> None:
        """Free the sequences whose last frame came back, and what was copied from one whose step failed."""
        failed = flight.sequences if frame.error else tuple(f.sequence for f in frame.failures)
        self._edits += map(Drop, self._prefixes.forget(failed) if failed else ())
        for sequence in self._flights.leaving:
            sequence.broken = sequence.broken or sequence.id in failed
        if left := self._flights.take_left():
            for sequence in left:
                self._leave(sequence)
            self._admit()

    def _keep(self, sequence: Sequence) -> None:
        """Have the stages keep what they hold of a sequence, where there is room for it."""
        cost = self._capacity.cost_of(max(len(sequence.fed), 1))
        if not fits(tuple(c + r for c, r in zip(cost, self.reserved, strict=True)), self._capacity.budget):
            return
        prefix, dropped = self._prefixes.keep(sequence.request.client, tuple(sequence.fed), cost, sequence.id)
        self._edits += map(Drop, dropped)
        if prefix is not None:
            self._edits.append(Save(sequence.id, prefix))
            free = tuple(b - r for b, r in zip(self._capacity.budget, self.reserved, strict=True))
            self._edits += map(Drop, self._prefixes.shrink_to(free))

    # Events of a frame that came back

    def _events(self, live: list[Sequence], frame: Frame) -> tuple[Produced | SampleFailed, ...]:
        if error := frame.error:
            for sequence in live:
                self._remove(sequence, keep=False)
            return tuple(SampleFailed(s.request.id, error.stage, error.reason, error.sentence) for s in live)
        by_id = {s.id: s for s in live}
        failed = [self._fail_sample(s, f) for f in frame.failures if (s := by_id.get(f.sequence))]
        return (
            *failed,
            *(self._account_sample(s, sample) for sample in frame.samples if (s := by_id.get(sample.sequence))),
        )

    def _fail_sample(self, sequence: Sequence, failure: SequenceFailure) -> SampleFailed:
        """One row of a lane went wrong on the last stage; the others have their samples."""
        self._remove(sequence, keep=False)
        return SampleFailed(sequence.request.id, len(self._capacity.budget) - 1, failure.reason, failure.sentence)

    def _account_sample(self, sequence: Sequence, sample: Sample) -> Produced:
        request, index = sequence.request, sequence.produced
        ended = sample.token in self._eos and not request.ignore_eos
        finish = FinishReason.STOP if ended else None
        if not ended:
            sequence.said.append(sample.token)
            sequence.next_token = sample.token
            finish = FinishReason.LENGTH if sequence.produced >= request.max_tokens else None
            finish = FinishReason.STOP if sample.final else finish
        if finish:
            self._remove(sequence, keep=True)
        return Produced(request.id, index, sample, finish, not ended, sequence.cached)

    # Frames

    def _decodes(self, now: float) -> list[Frame]:
        return [self._decode(lane, sequences, now) for lane, sequences in list(self._lanes.ready())]

    def _decode(self, lane: int, sequences: list[Sequence], now: float) -> Frame:
        rows = []
        for sequence in sequences:
            assert sequence.next_token is not None
            rows.append((sequence.next_token,))
            sequence.fed.append(sequence.next_token)
            sequence.next_token = None
        self._lanes.begin(lane, sequences)
        self._lanes_since_prefill.add(lane)
        step = Step(Compute.DECODE, tuple(s.id for s in sequences), tuple(rows))
        return self._log.write(lane, step, 0, now)

    def _neediest(self) -> Sequence | None:
        """Whose prompt has waited longest for its turn. Who comes new waits behind those that wait already."""
        return min((s for s in self._lanes if s.unsent and s.joined), key=lambda s: (s.served, s.id), default=None)

    def _prefillable(self) -> Sequence | None:
        """Whose prompt goes on, unless a decoding lane is to go first: one chunk at most between two steps."""
        sequence = self._neediest()
        paced = self._capacity.max_step_ms is not None
        if sequence and paced and not self._lanes_decoding(sequence) <= self._lanes_since_prefill:
            return None
        return sequence

    def _lanes_decoding(self, but: Sequence) -> set[int]:
        """The lanes in which others decode."""
        return {s.lane for s in self._lanes if s is not but and s.phase is Phase.DECODE}

    def _prefill(self, sequence: Sequence, now: float) -> Frame:
        start = len(sequence.fed)
        others = bool(self._lanes_decoding(sequence))
        self._lanes_since_prefill.clear()
        whole = sequence.prefill_length - sequence.cached
        count = self._pacing.chunk(whole, sequence.unsent, others_decode=others)
        tokens = sequence.base[start : start + count]
        sequence.fed.extend(tokens)
        step = Step(Compute.PREFILL, (sequence.id,), (tokens,))
        frame = self._log.write(sequence.lane, step, count, now)
        sequence.served = self._log.written
        self._finish_prompt(sequence)
        return frame
