"""The scheduler: requests in, the next frames out.

A request waits in the fair queue until every stage has room for its worst case. Then it enters the emptiest lane and
starts from the longest beginning that a kept prefix or a live sequence has. If another prompt that begins alike is
being prefilled, it waits until that one is where the two part. The rest of its prompt is sent as several prefill frames
that do not wait for each other. Decode frames, one per lane, go before prefill frames. While other sequences decode,
the prefill budget limits the size of a prefill frame, and each of their lanes gets one decode frame before the next
prefill frame.

A sequence whose grammar the last stage still compiles has no sample in the reply to its decode frame. It sits out
until its sample comes with a later frame (``cluster.scheduler.deferred``); the others of its lane go on.

Behind the decode frame of a lone sequence, frames may feed guesses of its next tokens
(``cluster.scheduler.guess_chains``).

Frames of one sequence come back in the order in which they were written. A decode frame may overtake prefill frames of
other sequences (``cluster.scheduler.reordering``). Every frame that is written comes back, or the ring is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf

from cluster.core.errors import BadFrame, RequestNotFound
from cluster.core.frames import Compute, Drop, Frame, Leave, Restore, Sample, Save, SequenceFailure, Step, Trim
from cluster.core.request import FinishReason, Grammar, Request
from cluster.scheduler.adapter_memory import AdapterMemory
from cluster.scheduler.cache_accounting import CacheMemory
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.deferred import DeferredSamples
from cluster.scheduler.disk_prefixes import DiskContents, DiskPrefixes, DiskUse
from cluster.scheduler.frame_writer import FrameWriter
from cluster.scheduler.guess_chains import GuessChains
from cluster.scheduler.guessing import Guesser
from cluster.scheduler.hidden_states import attach_states
from cluster.scheduler.in_flight import InFlightFrame
from cluster.scheduler.kept_marks import KeptMark
from cluster.scheduler.kv_cost import Cost, fits
from cluster.scheduler.lanes import LaneAssignment
from cluster.scheduler.live_requests import LiveRequests, MovedSample
from cluster.scheduler.marking import Marking
from cluster.scheduler.offers import Offers
from cluster.scheduler.outcome import Outcome, Produced, Refused, SampleFailed
from cluster.scheduler.prefill_budget import PrefillBudget
from cluster.scheduler.prefill_order import PrefillOrder
from cluster.scheduler.prefixes import MIN_HIT, Prefixes
from cluster.scheduler.prompt_scores import account_scores, longest_chunk, scoring_of
from cluster.scheduler.saving import Saving
from cluster.scheduler.sequence import Phase, ScheduledSequence
from cluster.scheduler.sharing import Copies, LiveStart, best_leader, live_starts


class Scheduler:
    """Schedules the requests of one model, across epochs.

    ``eos`` are the token ids that end an answer. ``guesser`` guesses tokens before they are sampled; None: nobody does.
    """

    def __init__(self, epoch: int, capacity: Capacity, eos: frozenset[int], guesser: Guesser | None = None) -> None:
        self._eos = eos
        self.speculation = GuessChains(guesser, eos)
        self._requests = LiveRequests(capacity.queue)
        self._waiting, self._by_request = self._requests.waiting, self._requests.by_id
        self.disk_use = DiskUse()
        self.offers = Offers(self._requests)
        self._open(epoch, capacity, None)

    def _open(self, epoch: int, capacity: Capacity, disk: DiskContents | None) -> None:
        self._epoch, self._capacity = epoch, capacity
        self._lanes = LaneAssignment(capacity.lanes, capacity.rows)
        self._prefixes = Prefixes(capacity.prefix_budget, trimmable=capacity.mark_cost_of is None)
        self._prefill_budget = PrefillBudget(capacity)
        self._by_id: dict[int, ScheduledSequence] = {}
        self._writer = FrameWriter(epoch)
        self._flights, self._edits = self._writer.flights, self._writer.edits
        self._marking = Marking(capacity, self._prefixes, self._edits, self._prefill_budget.fixed_cost)
        self._saving = Saving(capacity, self._prefixes, self._edits)
        self._copies = Copies()
        self._deferred = DeferredSamples()
        self._prefill_order = PrefillOrder(self._lanes, self._deferred, limited=capacity.max_step_ms is not None)
        self._memory = CacheMemory(capacity, self._lanes, self._flights, self._prefixes, lambda: self.disk.reserved)
        self.speculation.begin_epoch(
            len(capacity.budget), self._writer, self._memory.has_room_for_marks, capacity.verify_costs
        )
        self.disk = DiskPrefixes(
            epoch, disk, self.disk_use, capacity, self._prefixes, self._prefill_budget, self._edits,
            self._memory.beside_sequences, self._join, self._admit,
        )  # fmt: skip
        self.offers.open(capacity, self._lanes, self._memory, self._prefill_budget, self._sources)
        self.adapters = AdapterMemory(self._memory, self._edits, self._by_request, self._admit)

    # Queries

    @property
    def sequences(self) -> tuple[ScheduledSequence, ...]:
        """Every live request in order of arrival: first those in a lane, then the waiting ones."""
        return (*sorted(self._lanes, key=lambda s: s.id), *self._waiting)

    @property
    def lane_sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self._lanes.members))

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def reserved(self) -> Cost:
        """Worst-case bytes of the live sequences' caches, per stage."""
        return self._memory.reserved

    @property
    def prefixes(self) -> Prefixes:
        return self._prefixes

    def oldest(self) -> tuple[float, int] | None:
        return self._flights.oldest()

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of a live request, or None if no request has one."""
        return self._requests.next_deadline()

    def ask_due(self) -> float | None:
        """Return when ``next_frames`` asks for deferred samples, or when one is late; None if neither is to come."""
        ask_at = inf if self._flights else self._deferred.ask_at()
        due = min(ask_at, self._deferred.late_at())
        return None if due == inf else due

    def late(self, now: float) -> list[tuple[str, Grammar]]:
        """Return the requests whose grammar the last stage has not compiled in time."""
        return self._deferred.late(now)

    def overdue(self, now: float) -> list[str]:
        """Return the ids of all live requests, waiting or not, whose deadline has passed."""
        return self._requests.overdue(now)

    # Events

    def submit(self, *requests: Request, answers: tuple[tuple[int, ...], ...] = ()) -> tuple[Refused, ...]:
        """Accept all of the requests, or none. Remove and return waiting requests of others that they displace.

        Several requests are samples of one prompt. ``answers`` are the answers so far, one per request, of
        requests that are resumed.

        Raise ``Busy`` if the queue is full, ``PromptTooLong`` for a request that can never fit, and
        ``InvalidRequest`` for an id that is already live.
        """
        displaced = self._requests.add(requests, answers, self._memory.why_never_fits)
        self._admit()
        return displaced

    def hand_over(self, request_ids: Sequence[str]) -> tuple[MovedSample, ...]:
        """Remove requests so that another scheduler can go on with them. Return them in the order of ``request_ids``.

        Nothing of them is kept here. Ids that are not live are left out.
        """
        leaving = [s for i in request_ids if (s := self._by_request.get(i))]
        moved = tuple(map(self._requests.describe, leaving))
        for sequence in sorted(leaving, key=lambda s: s.phase is not Phase.QUEUED):  # so that none of them is admitted
            self._remove(sequence, keep=False)
        return moved

    def take_over(self, moved: Iterable[MovedSample]) -> tuple[MovedSample, ...]:
        """Go on with requests that another scheduler handed over. Return those that can never fit here."""
        offered = tuple(moved)
        fitting = [s for s in offered if not self._memory.why_never_fits(len(s.request.prompt) + s.request.max_tokens)]
        self._requests.take_over(fitting)
        self._admit()
        return tuple(s for s in offered if s not in fitting)

    def begin_epoch(self, epoch: int, capacity: Capacity, disk: DiskContents | None = None) -> tuple[Refused, ...]:
        """Continue on the stages of a new epoch, which have nothing but the prefixes on their disks.

        Requests that had a lane are prefilled again with their answers so far, before those that wait. Remove and
        return the requests that the new stages can never hold.
        """
        lost = sorted(self._lanes, key=lambda s: s.id)
        for sequence in self._by_request.values():
            self.speculation.drop_unverified(sequence)
            sequence.reset_for_replay()
        self._waiting.put_back(lost)
        self._open(epoch, capacity, disk)
        refused = [Refused(s.request.id, why) for s in self._waiting if (why := capacity.why_never_fits(s.reserved))]
        for refusal in refused:
            removed = self._by_request.pop(refusal.request_id)
            self._waiting.remove(removed)
            self.speculation.leave(removed, learn=False)
        self._admit()
        return tuple(refused)

    def end(self, request_id: str) -> ScheduledSequence:
        """Remove and return a request. Its caches are kept as a prefix or freed.

        Raise ``RequestNotFound`` if it is not live.
        """
        sequence = self._by_request.get(request_id)
        if sequence is None:
            raise RequestNotFound(f"no live request has the id {request_id}; it may have ended")
        self._remove(sequence, keep=True)
        return sequence

    def on_frame(self, frame: Frame, now: float | None = None) -> Outcome:
        """Account for a frame that the last stage sent back. Raise ``BadFrame`` if it is unexpected or invalid.

        ``now`` is the time at which it came back, from which its lap is measured.
        """
        if frame.epoch != self._epoch:
            raise BadFrame(f"unexpected frame of epoch {frame.epoch}: the current epoch is {self._epoch}")
        flight = self._flights.receive(frame)
        if frame.void and not flight.guessed:
            raise BadFrame(f"invalid frame {frame.number} of epoch {frame.epoch}: it is void, but it was no guess")
        live = [s for i in flight.sequences if (s := self._by_id.get(i))]
        decodes = flight.compute is Compute.DECODE and not frame.error
        if decodes:
            live = self.speculation.receive(flight, live, frame, now)
        if not frame.error and (live or not flight.guessed) and flight.sampled == 1:
            context = live[0].prefilled if live else None
            self._prefill_budget.learn(flight.compute, flight.prefills, frame.timings, context)
        for sequence in live:
            sequence.prefilled += flight.prefills
        self._spoil(flight, frame)
        events = (*account_scores(flight, live, frame), *self._events(live, frame))
        if decodes:
            self._deferred.add_unanswered(live, frame, flight.sent_at)
        if flight.compute is Compute.DECODE:
            self._lanes.end(flight.lane, flight.number, () if frame.error else live)
        self._free_finished()
        rows = len(flight.sequences) if decodes and live and flight.sampled == 1 else 0
        self.offers.learn(rows, sum(t.compute_us for t in frame.timings), now or flight.sent_at)
        context = sum(s.prefilled + s.produced for s in live) // max(len(live), 1)
        return Outcome(
            tuple(s.request.id for s in live),
            frame.timings,
            flight.sent_at,
            events,
            rows=rows,
            context=context,
            prefills=flight.prefills,
        )

    def guess_frames(self, now: float) -> list[Frame]:
        """Return frames that feed guesses. Call it once the frames of ``next_frames`` have been sent."""
        return self.speculation.write(self._prefill_order.decoding(), now, busy=self._reads_prompt)

    @property
    def _reads_prompt(self) -> bool:
        return self._flights.prefills > 0 or any(s.unsent for s in self._lanes)

    def next_frames(self, now: float) -> list[Frame]:
        """Return every frame that can be written now, decode before prefill. The first one carries the edits."""
        for blocking in self._lanes.blocking():
            self.speculation.drop_frames(blocking)
        self._lanes.rebalance(lambda members: fits(self._memory.cost(members), self._memory.beside_prefixes()))
        frames = [*self._writer.write_overflow(now), *self._decodes(now)]
        while self._flights.prefills < self._capacity.window and (sequence := self._prefill_order.next()):
            frames.append(self._prefill(sequence, now))
            frames += self._decodes(now)
        frames += self._writer.write_remaining(now)
        if not self._flights and self._deferred.ask_at() <= now:
            frames.append(self._writer.ask(now))
        if frames:
            self._deferred.on_written(now)
        return frames

    # Memory and lanes

    def _admit(self) -> None:
        """Admit waiting requests in turn while memory lasts. None overtakes a request that waits for memory."""
        while (sequence := self._waiting.first()) and self._make_room(sequence):
            self._waiting.take()
            self._lanes.enter(sequence)
            self._by_id[sequence.id] = sequence
            self._join(sequence)

    def _make_room(self, sequence: ScheduledSequence) -> bool:
        """Drop least recently used prefixes until a sequence fits. Return False if it does not fit even without any."""
        members = self._lanes.with_one_more(sequence)
        if members is None:
            return False
        cost, budget = self._memory.cost(members), self._capacity.budget
        if not fits(cost, budget):
            return False
        limit = tuple(b - c for b, c in zip(budget, cost, strict=True))
        self._prefixes.touch(sequence.owner, sequence.beginning)
        self._edits += map(Drop, self._prefixes.evict_to(limit))
        self._marking.drop_marks((*self._lanes, *self._flights.leaving), limit)
        return True

    # Where a prompt starts

    def _join(self, sequence: ScheduledSequence) -> None:
        """Start a sequence from the longest kept or live beginning, or make it wait for one that is being prefilled."""
        kept = self._prefixes.find(sequence.owner, sequence.beginning)
        live = live_starts(sequence, self._sources(sequence), trimmable=not self._marking.caches_need_marks)
        copied = max(live, key=lambda start: start.now, default=None)
        kept_length = kept.length if kept else 0
        copied_length = copied.now if copied else 0
        sequence.leader = None
        if awaited := best_leader(live, max(kept_length, copied_length), MIN_HIT):
            sequence.leader, sequence.awaits = awaited.source, awaited.later
            self._marking.choose_chunk_ends(awaited.source, [awaited.later])
            return
        if self.disk.wait(sequence, max(kept_length, copied_length)):
            return
        sequence.joined = True
        sequence.last_served_at_frame = self._writer.written
        self._edits.append(self.speculation.join(sequence))
        if copied and copied_length >= MIN_HIT and copied_length > kept_length:
            self._copy(copied, sequence)
        elif kept:
            self._copies.add(kept.source.sequence, sequence.id, kept.source.frame)
            self._edits.append(Restore(sequence.id, kept.prefix, kept.length))
            sequence.start = kept
            self._begin_at(sequence, kept.length, kept.marks)
        kept_shared = self._prefixes.shared(sequence.owner, sequence.base)
        self._marking.choose_chunk_ends(sequence, [kept_shared, *(start.shared for start in live)])
        self._marking.mark(sequence, self._memory.beside_sequences())
        self._finish_prompt(sequence)

    def _sources(self, sequence: ScheduledSequence) -> list[ScheduledSequence]:
        """Return the live sequences that ``sequence`` may start from."""
        live = (*self._lanes, *self._flights.leaving)
        return [s for s in live if s.joined and not s.broken and s.owner == sequence.owner]

    def _copy(self, start: LiveStart, sequence: ScheduledSequence) -> None:
        """Let a sequence start from a copy of a live one. The same edits drop the copy's prefix again."""
        source, prefix = start.source, self._prefixes.temporary_id()
        self._copies.add(source.id, sequence.id, self._writer.written)
        self._edits += [Save(source.id, prefix), Restore(sequence.id, prefix, start.now), Drop(prefix)]
        self._begin_at(sequence, start.now, {at: mark for at, mark in source.marks.items() if at <= start.now})

    def _begin_at(self, sequence: ScheduledSequence, length: int, marks: Mapping[int, KeptMark]) -> None:
        """Account for a sequence that joined with the first ``length`` tokens of its prompt, and with ``marks``."""
        sequence.fed.extend(sequence.base[:length])
        sequence.cached = sequence.prefilled = length
        sequence.marks = dict(marks)
        self._prefixes.hold(marks.values())

    def _finish_prompt(self, sequence: ScheduledSequence) -> None:
        """Let a sequence decode once its prompt is sent completely."""
        if not sequence.unsent:
            sequence.next_token = sequence.base[-1]

    def _wake(self, leader: ScheduledSequence) -> None:
        """Let those that wait for ``leader`` join, if it has got as far as they need, or ends."""
        waiting = [s for s in self._lanes if s.leader is leader and (leader.ended or len(leader.fed) >= s.awaits)]
        for sequence in sorted(waiting, key=lambda s: s.id):
            self._join(sequence)

    def _restart(self, sequence: ScheduledSequence) -> None:
        """Queue a sequence again, first and under a new id: it started from a copy that a failed step has spoiled."""
        spoiled = replace(sequence, ended=True, broken=True)
        self._deferred.discard(sequence)
        self._lanes.leave(sequence)
        followers = [s for s in self._lanes if s.leader is sequence]
        sequence.reset_for_replay()
        sequence.id = self._requests.next_id()
        self._waiting.put_back([sequence])
        self._vacate(spoiled)
        for follower in followers:
            self._join(follower)

    def _remove(self, sequence: ScheduledSequence, *, keep: bool) -> None:
        del self._by_request[sequence.request.id]
        self.speculation.leave(sequence, learn=keep)
        if keep and sequence.answer:
            self.offers.learn_answer(sequence.produced)
        self._deferred.discard(sequence)
        if sequence.phase is Phase.QUEUED:
            self._waiting.remove(sequence)
        else:
            sequence.ended, sequence.broken = True, not keep
            self._wake(sequence)
            self._lanes.leave(sequence)
            self._vacate(sequence)
        self._admit()

    def _vacate(self, sequence: ScheduledSequence) -> None:
        """Let a sequence that is in no lane any more leave its stages, once its last frame has come back.

        Guesses that still wait on a stage are trimmed at once, so that no stage computes them.
        """
        del self._by_id[sequence.id]
        self.speculation.drop_unverified(sequence)
        if sequence.trim_to is not None and not sequence.broken:
            self._edits.append(Trim(sequence.id, sequence.trim_to))
            sequence.trim_to = None
        if not self._flights.defer_leave(sequence):
            self._leave(sequence)

    def _leave(self, sequence: ScheduledSequence) -> None:
        """Keep or free the caches of a sequence that has no frame in the ring.

        All stages hold the same state of it now, unless a step of it failed; then nothing is kept.
        """
        if len(sequence.fed) > sequence.cached and not sequence.broken:
            prefix = self._saving.keep(sequence, self._memory.beside_sequences(), self._writer.written)
            self.disk.persist(sequence, prefix)
        self._marking.release(sequence)
        if sequence.joined:
            self._edits.append(Leave(sequence.id))

    def _spoil(self, flight: InFlightFrame, frame: Frame) -> None:
        """Drop what was copied from a sequence after its step failed. Start live copies again."""
        failed = set(flight.sequences) if frame.error else {f.sequence for f in frame.failures}
        if failed:
            spoiled = self._copies.find_spoiled(failed, frame.number)
            self._edits += map(Drop, [*self._prefixes.forget(failed, frame.number), *self._prefixes.forget(spoiled)])
            for sequence in (*self._lanes, *self._flights.leaving):
                sequence.broken = sequence.broken or sequence.id in failed | spoiled
            for sequence in [s for s in self._lanes if s.id in spoiled]:
                self._restart(sequence)
            self._admit()
        self._copies.prune(self._flights)

    def _free_finished(self) -> None:
        """Free ended sequences whose last frame came back."""
        if left := self._flights.take_departed():
            for sequence in left:
                self._leave(sequence)
            self._admit()

    # Events of a frame that came back

    def _events(self, live: list[ScheduledSequence], frame: Frame) -> tuple[Produced | SampleFailed, ...]:
        if error := frame.error:
            for sequence in live:
                self._remove(sequence, keep=False)
            return tuple(SampleFailed(s.request.id, error.stage, error.reason, error.sentence) for s in live)
        by_id = {s.id: s for s in (*live, *self._deferred)}
        samples = attach_states(frame)
        return (  # a row may fail behind its first samples
            *(self._account_sample(s, sample) for sample in samples if (s := by_id.get(sample.sequence))),
            *(self._fail_sample(s, f) for f in frame.failures if (s := by_id.get(f.sequence))),
        )

    def _fail_sample(self, sequence: ScheduledSequence, failure: SequenceFailure) -> SampleFailed:
        """Remove a sequence whose row failed on the last stage. The other rows of its lane have their samples."""
        self._remove(sequence, keep=False)
        return SampleFailed(sequence.request.id, len(self._capacity.budget) - 1, failure.reason, failure.sentence)

    def _account_sample(self, sequence: ScheduledSequence, sample: Sample) -> Produced:
        request = sequence.request
        self._deferred.discard(sequence)
        index = sequence.produced
        ended = request.max_tokens == 0 or (sample.token in self._eos and not request.ignore_eos)
        finish = (FinishReason.STOP if request.max_tokens else FinishReason.LENGTH) if ended else None
        guess, missed = self.speculation.verify(sequence, sample)
        if not ended:
            sequence.answer.append(sample.token)
            sequence.next_token = None if sequence.chain else sample.token
            finish = FinishReason.LENGTH if sequence.produced >= request.max_tokens else None
            finish = FinishReason.STOP if sample.final else finish
        if finish:
            self.speculation.drop_all(sequence)
            self._remove(sequence, keep=not request.embeds)  # such texts rarely share what would be worth its memory
        return Produced(request.id, index, sample, finish, not ended, sequence.cached, guess, missed)

    # Frames

    def _decodes(self, now: float) -> list[Frame]:
        return [self._decode(lane, sequences, now) for lane, sequences in list(self._lanes.ready())]

    def _decode(self, lane: int, sequences: list[ScheduledSequence], now: float) -> Frame:
        number = self._writer.written
        trims = [Trim(s.id, s.trim_to) for s in sequences if s.trim_to is not None]
        start = len(sequences[0].fed) if len(sequences) == 1 else None
        for sequence in sequences:
            sequence.feed_next(number)
        if len(sequences) == 1:
            self.speculation.extend_head(sequences[0], self._prefill_order.decoding(), busy=self._reads_prompt)
        rows = tuple(s.chain[0].tokens for s in sequences)
        self._lanes.begin(lane, sequences, number)
        self._prefill_order.on_decode(lane)
        step = Step(Compute.DECODE, tuple(s.id for s in sequences), rows, guesses=len(rows[0]) - 1, start=start)
        return self._writer.write(lane, step, 0, now, trims)

    def _prefill(self, sequence: ScheduledSequence, now: float) -> Frame:
        start = len(sequence.fed)
        others = bool(self._prefill_order.lanes_decoding(sequence))
        self._prefill_order.on_prefill()
        count = self._prefill_budget.chunk(sequence.cached, start, sequence.unsent, others_decode=others)
        count = min(count, sequence.next_chunk_end - start, longest_chunk(sequence, self._capacity))
        tokens = sequence.base[start : start + count]
        sequence.fed.extend(tokens)
        step = Step(Compute.PREFILL, (sequence.id,), (tokens,), scoring_of(sequence, start, count))
        frame = self._writer.write(sequence.lane, step, count, now)
        sequence.last_served_at_frame = self._writer.written
        self._marking.mark_progress(sequence, self._memory.beside_sequences())
        self._wake(sequence)
        if any(s.leader is sequence for s in self._lanes):
            self._saving.save_progress(sequence, self._memory.beside_sequences(), self._writer.written)
        self._finish_prompt(sequence)
        return frame
