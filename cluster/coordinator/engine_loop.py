"""The engine loop: one thread that drives the scheduler and carries out what it decides.

Frames, requests and losses arrive in one inbox, in one order; nothing else touches the scheduler. A frame that came
back is answered with the next frames first and turned into text afterwards, so detokenizing is off the ring's path.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from cluster.coordinator.active_requests import ActiveRequest, ActiveSample, split_samples
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.answer_text import AnswerText, Decoder, Parser, make_plain
from cluster.coordinator.job_queue import Job, JobQueue
from cluster.coordinator.journal import Journal, Said
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.request_timings import LoopTotals, RequestTimings
from cluster.coordinator.ring import Ring
from cluster.coordinator.stage_utilization import StageUtilization
from cluster.coordinator.step_times import StepTimes
from cluster.core.errors import (
    DeadlineExceeded,
    FrameOverdue,
    InvalidRequest,
    MacpipeError,
    NotServing,
    RequestNotFound,
    SlowReader,
    WorkerLost,
)
from cluster.core.limits import LOOP_STOP_S, MAX_REPLAYS
from cluster.core.plan import Plan
from cluster.core.request import Accepted, FinishReason, Parsing, Request, Usage
from cluster.membership.frame_deadlines import FrameDeadlines
from cluster.membership.slowness import extra_s
from cluster.platform.overload import Lag, no_lag
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.outcome import Outcome, Produced, SampleFailed
from cluster.scheduler.scheduler import Scheduler
from cluster.wire.frame_codec import decode, encode

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs one model over as many epochs as it takes. ``broken`` is told, on the loop's thread, when a ring is lost.

    From then on requests wait: nothing is sent, none has ended, new ones are taken. ``resume`` goes on with another
    ring, where every answer was; ``refuse`` ends what is live and takes nothing, until somebody resumes after all.
    """

    def __init__(
        self,
        plan: Plan,
        scheduler: Scheduler,
        decoder: Callable[[], Decoder],
        broken: Callable[[MacpipeError], None],
        clock: Callable[[], float] = time.monotonic,
        pace: StepTimes | None = None,
        parser: Callable[[Parsing], Parser] = make_plain,
        lag: Lag = no_lag,
    ) -> None:
        self._scheduler, self._decoder, self._parser = scheduler, decoder, parser
        self._broken, self._clock, self._lag = broken, clock, lag
        self.patience = FrameDeadlines(clock())
        self._asked: dict[str, ActiveRequest] = {}
        self._inbox = JobQueue()
        self._live: dict[str, ActiveSample] = {}
        self.post = EventBatch()  # of every answer that is submitted here; it goes out after each job
        self._ring: Ring | None = None
        self._loss: tuple[int, WorkerLost] | None = None
        self._refusal: MacpipeError | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self.totals = LoopTotals()  # what a canary adds to nobody reads: others are put here later
        self.journal: Journal | None = None  # only this loop's thread writes to it
        self.proven = 0  # the epoch through whose stages a token has gone
        self._begin(plan, pace)

    def _begin(self, plan: Plan, pace: StepTimes | None) -> None:
        self._plan, self._pace = plan, pace
        self._occupancy = StageUtilization(len(plan.stages))
        self.patience = FrameDeadlines(self._clock(), overdue=self.patience.overdue)

    # Called from other threads

    def start(self, ring: Ring) -> None:
        """Begin with the first epoch's ring."""
        self._ring = ring
        self._thread.start()

    def resume(self, plan: Plan, capacity: Capacity, ring: Ring, pace: StepTimes | None = None) -> None:
        """Go on with a new epoch's ring, whose stages hold nothing yet."""
        self._inbox.put(lambda: self._resume(plan, capacity, ring, pace))

    def hold(self) -> None:
        """Let requests wait from now on: the ring is about to be taken down."""
        self._inbox.put(self._close_ring)

    def submit(self, request: Request, answer: AnswerQueue, said: Said = (), skip: tuple[int, ...] = ()) -> None:
        """Take a request; everything that becomes of it, refusal too, goes to ``answer``. One that is resumed has
        ``said`` some of its answers, and its reader has the first ``skip`` tokens of each already.

        Raises ``NotServing`` after ``stop``.
        """
        if not self._inbox.put(lambda: self._submit(request, answer, said, skip)):
            raise NotServing("the model is not served any more; send the request again once another is")

    def end(self, request_id: str, error: MacpipeError) -> Future[bool]:
        """End a request with an error; the future says whether it was live."""
        return self._inbox.ask(lambda: self._end(request_id, error))

    def on_message(self, message: bytes) -> None:
        """A frame from the last stage."""
        self._inbox.put(lambda: self._on_frame(message))

    def on_stream_lost(self, epoch: int, worker: str, why: str) -> None:
        """A stream of an epoch's ring broke."""
        self._inbox.put(lambda: self._on_stream_lost(epoch, WorkerLost(f"{worker}: {why}", worker=worker)))

    def suspect(self, cause: MacpipeError) -> None:
        """The ring that is in use is no good, whatever its streams say."""
        self._inbox.put(lambda: self._suspect(cause))

    def refuse(self, error: MacpipeError) -> None:
        """Every live request ends with ``error``, and so does every new one until the loop resumes."""
        self._inbox.put(lambda: self._refuse(error))

    def stop(self, error: MacpipeError) -> None:
        """End what is live with ``error``, then the thread; returns when both are done, or after ``LOOP_STOP_S``."""
        self._inbox.put(lambda: self._refuse(error))
        self._inbox.close()
        if self._thread.ident is None:
            return
        self._thread.join(LOOP_STOP_S)
        if self._thread.is_alive():
            log.error("engine loop: still running after its stop seconds=%.0f", LOOP_STOP_S)

    def view(self) -> Future[LoopView]:
        """Everything under way, as the loop's thread sees it."""
        return self._inbox.ask(self._view)

    def _view(self) -> LoopView:
        ages = {request_id: self._clock() - live.accepted_at for request_id, live in self._live.items()}
        return LoopView.of(self._scheduler, ages, self._occupancy, self._pace)

    # The loop's own thread

    def _run(self) -> None:
        while True:
            patience = self._wait_s()
            if patience == 0.0:  # looked at between any two jobs: a busy loop's inbox is never empty
                self._do(self._look_at_the_clock)
                patience = self._wait_s()
            try:
                job = self._inbox.get(patience)
            except queue.Empty:
                continue
            if job is None:
                return
            self._do(job)

    def _do(self, job: Job) -> None:
        try:
            job()
        except Exception as e:  # the thread's edge: a request must end with an error rather than wait for ever
            log.exception("the engine loop failed")
            self._suspect(MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))
        self.post.deliver()
        if self.journal:
            self.journal.flush()  # readers come first: whatever a disk does, they have been told

    def _wait_s(self) -> float | None:
        """Seconds until a frame or a request is overdue; None where neither can be."""
        due = min((t for t in (self._frame_due(), self._scheduler.next_deadline()) if t is not None), default=None)
        return None if due is None else max(0.0, due - self._clock())

    def _frame_due(self) -> float | None:
        """When the oldest frame in the ring has to be back; None where the ring is empty."""
        oldest = self._scheduler.oldest() if self._ring else None
        return self.patience.due_at(*oldest, extra_s(self._lag())) if oldest else None

    def _look_at_the_clock(self) -> None:
        """End requests whose deadline has passed, and give the ring up where a frame is overdue."""
        now = self._clock()
        for request_id in self._scheduler.overdue(now):
            self._end(request_id, DeadlineExceeded(f"the deadline of request {request_id} passed"))
        if (due := self._frame_due()) is not None and due <= now:
            self.patience.overdue += 1
            self._suspect(FrameOverdue(f"no frame came through the stages for {now - self.patience.alive_at:.0f} s"))

    def _flush(self) -> None:
        if not self._ring:
            return
        for frame in self._scheduler.next_frames(self._clock()):
            self._ring.send(encode(frame))

    def _submit(self, request: Request, answer: AnswerQueue, said: Said, skip: tuple[int, ...]) -> None:
        if self._refusal:
            answer.put(self._refusal)
            return
        samples, asked = split_samples(request), ActiveRequest(request, answer)
        try:
            if request.id in self._asked:
                raise InvalidRequest(f"a request with the id {request.id} is already live", field="request_id")
            self._scheduler.submit(*samples, said=said)
        except MacpipeError as e:
            answer.put(e)
            return
        self._flush()
        now = self._clock()
        self._asked[request.id] = asked
        for i, sample in enumerate(samples):
            asked.live.add(sample.id)
            text = AnswerText(request, self._decoder(), self._parser)
            tally = RequestTimings(now, self._plan.stages)
            self._live[sample.id] = ActiveSample(asked, sample, i, text, tally, now, skip[i] if skip else 0)
        answer.put(Accepted())
        if self.journal:
            self.journal.record_opened(request, said)
        for sample, begun in zip(samples, said, strict=False):
            self._live[sample.id].say_again(begun)

    def _end(self, request_id: str, error: MacpipeError) -> bool:
        """End a request, by its own id or one of its samples', with all of its samples."""
        live = self._live.get(request_id)
        asked = live.asked if live else self._asked.get(request_id)
        if asked is None:
            return False
        del self._asked[asked.request.id]
        for sample in sorted(asked.live):
            del self._live[sample]
            try:
                self._scheduler.end(sample)
            except RequestNotFound:
                log.debug("request %s had left the schedule", sample)
        self._flush()
        asked.answer.put(error)
        if self.journal:
            self.journal.record_ended(asked.request.id)
        return True

    def _on_frame(self, message: bytes) -> None:
        if not self._ring:
            return
        try:
            frame = decode(message)
            if frame.epoch < self._plan.epoch:
                return  # a stage that has not heard of the new epoch
            outcome = self._scheduler.on_frame(frame)
        except MacpipeError as e:
            self._suspect(e)
            return
        self.patience.learn(outcome.prefills, outcome.sent_at, self._clock())
        self._flush()
        self._account(outcome)

    def _account(self, outcome: Outcome) -> None:
        now = self._clock()
        self._occupancy.frame(outcome.sent_at, now, outcome.timings)
        if self._pace and outcome.rows:
            self._pace.frame(outcome.timings, outcome.rows, outcome.context)
        for request_id in outcome.request_ids:
            if live := self._live.get(request_id):
                live.tally.frame(outcome, now)
        for event in outcome.events:
            if live := self._live.get(event.request_id):
                self._tell_safely(live, event, now)

    def _tell_safely(self, live: ActiveSample, event: Produced | SampleFailed, now: float) -> None:
        try:
            self._tell(live, event, now)
        except Exception as e:  # a tokenizer may raise anything; that ends its own request and nobody else's
            log.exception("request %s failed", live.request.id)
            self._end(live.request.id, MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))

    def _tell(self, live: ActiveSample, event: Produced | SampleFailed, now: float) -> None:
        if isinstance(event, Produced):
            self.proven = self._plan.epoch
            live.tally.token(now)
            self._on_token(live, event)
            return
        worker = self._plan.stages[event.stage].worker if event.stage < len(self._plan.stages) else "a stage"
        self._end(live.request.id, MacpipeError.of(event.reason, f"{worker}: {event.sentence}", worker=worker))

    def _on_token(self, live: ActiveSample, produced: Produced) -> None:
        finish, live.replays = produced.finish, 0
        if produced.counts:
            self.totals.tokens += 1
            if self.journal:
                self.journal.record_token(live.asked.request.id, produced.sample.token, live.sample)
            if not live.say(produced.index, produced.sample, produced.cached):
                self._end(live.request.id, SlowReader("the client did not read its tokens, so the answer was ended"))
                return
        if live.text.stopped and finish is not FinishReason.STOP:
            finish = FinishReason.STOP
            self._leave(live)
        if finish:
            said = produced.index + produced.counts
            self._finish(live, finish, Usage(len(live.request.prompt), said, produced.cached))

    def _leave(self, live: ActiveSample) -> None:
        try:
            self._scheduler.end(live.request.id)
        except RequestNotFound:
            return  # its last token was also its longest allowed
        self._flush()

    def _finish(self, live: ActiveSample, reason: FinishReason, usage: Usage) -> None:
        last = live.finish(reason, usage)
        del self._live[live.request.id]
        live.asked.live.remove(live.request.id)
        if not live.asked.live:
            del self._asked[live.asked.request.id]
        self.totals.finished += 1
        live.asked.answer.put(last)
        if self.journal and not live.asked.live:
            self.journal.record_ended(live.asked.request.id)

    # Rings come and go

    def _on_stream_lost(self, epoch: int, loss: WorkerLost) -> None:
        self._loss = (epoch, loss)  # of a ring that has been opened but not taken up yet, perhaps
        if epoch == self._plan.epoch:
            self._suspect(loss)

    def _suspect(self, cause: MacpipeError) -> None:
        """The ring is lost: stop, and have the cause looked into."""
        if self._ring:
            self._close_ring()
            self._broken(cause)

    def _resume(self, plan: Plan, capacity: Capacity, ring: Ring, pace: StepTimes | None) -> None:
        self._close_ring()
        self._ring, self._refusal = ring, None
        self._begin(plan, pace)
        for refused in self._scheduler.begin_epoch(plan.epoch, capacity):
            self._end(refused.request_id, WorkerLost(f"the Macs that are left cannot hold it: {refused.sentence}"))
        for live in tuple(self._live.values()):
            live.tally.go_on(plan.stages)
            live.replays += 1
            if live.replays > MAX_REPLAYS:
                self._end(live.request.id, WorkerLost(f"{MAX_REPLAYS} times a stage was lost over this request"))
        if self._loss and self._loss[0] == plan.epoch:
            self._suspect(self._loss[1])
        self._flush()

    def _refuse(self, error: MacpipeError) -> None:
        self._refusal = error
        self._close_ring()
        for request_id in tuple(self._asked):
            self._end(request_id, error)

    def _close_ring(self) -> None:
        if self._ring:
            self._ring.close()
        self._ring = None
