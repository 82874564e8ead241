"""Run the engine loop: one thread that drives the scheduler and carries out its decisions.

Frames, requests and losses arrive in one inbox, in one order. Nothing else touches the scheduler. When a frame comes
back, the loop sends the next frames first and detokenizes afterwards, so detokenizing does not delay the ring.
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
    """Runs one model through any number of epochs. Calls ``broken`` on the loop's thread when a ring is lost.

    While there is no ring, requests wait: the loop sends nothing, ends no request and accepts new ones. ``resume``
    continues every answer with a new ring. ``refuse`` ends all live requests and rejects new ones until ``resume``.
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
        self._requests: dict[str, ActiveRequest] = {}
        self._inbox = JobQueue()
        self._live: dict[str, ActiveSample] = {}
        self.post = EventBatch()  # events of all answers; delivered after each job
        self._ring: Ring | None = None
        self._loss: tuple[int, WorkerLost] | None = None
        self._refusal: MacpipeError | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self.totals = LoopTotals()  # replaced after the canary, so the canary's tokens are not counted
        self.journal: Journal | None = None  # only this loop's thread writes to it
        self.proven = 0  # the last epoch that produced a token
        self._begin_epoch(plan, pace)

    def _begin_epoch(self, plan: Plan, pace: StepTimes | None) -> None:
        self._plan, self._pace = plan, pace
        self._occupancy = StageUtilization(len(plan.stages))
        self.patience = FrameDeadlines(self._clock(), overdue=self.patience.overdue)

    # Called from other threads

    def start(self, ring: Ring) -> None:
        """Start the thread with the first epoch's ring."""
        self._ring = ring
        self._thread.start()

    def resume(self, plan: Plan, capacity: Capacity, ring: Ring, pace: StepTimes | None = None) -> None:
        """Continue with a new epoch's ring, whose stages hold no caches yet."""
        self._inbox.put(lambda: self._resume(plan, capacity, ring, pace))

    def hold(self) -> None:
        """Close the ring and keep requests waiting until ``resume`` or ``refuse``."""
        self._inbox.put(self._close_ring)

    def submit(self, request: Request, answer: AnswerQueue, said: Said = (), skip: tuple[int, ...] = ()) -> None:
        """Queue a request. All its events, including a refusal, go to ``answer``.

        For a resumed request, ``said`` holds the tokens of each sample so far, and ``skip`` the number of them that
        the reader already has. Raises ``NotServing`` after ``stop``.
        """
        if not self._inbox.put(lambda: self._submit(request, answer, said, skip)):
            raise NotServing("the model is no longer served; send the request again once a model is loaded")

    def end(self, request_id: str, error: MacpipeError) -> Future[bool]:
        """End a request with an error. The future resolves to whether the request was live."""
        return self._inbox.ask(lambda: self._end(request_id, error))

    def on_message(self, message: bytes) -> None:
        """Queue a frame from the last stage."""
        self._inbox.put(lambda: self._on_frame(message))

    def on_stream_lost(self, epoch: int, worker: str, why: str) -> None:
        """Queue the loss of a stream of an epoch's ring."""
        self._inbox.put(lambda: self._on_stream_lost(epoch, WorkerLost(f"{worker}: {why}", worker=worker)))

    def suspect(self, cause: MacpipeError) -> None:
        """Treat the current ring as lost, even if its streams are open."""
        self._inbox.put(lambda: self._suspect(cause))

    def refuse(self, error: MacpipeError) -> None:
        """End every live request, and every new one until ``resume``, with ``error``."""
        self._inbox.put(lambda: self._refuse(error))

    def stop(self, error: MacpipeError) -> None:
        """End live requests with ``error``, then the thread. Wait at most ``LOOP_STOP_S``."""
        self._inbox.put(lambda: self._refuse(error))
        self._inbox.close()
        if self._thread.ident is None:
            return
        self._thread.join(LOOP_STOP_S)
        if self._thread.is_alive():
            log.error("engine loop: thread did not stop in time seconds=%.0f", LOOP_STOP_S)

    def view(self) -> Future[LoopView]:
        """Return a future of the live requests, lanes and memory, taken on the loop's thread."""
        return self._inbox.ask(self._view)

    def _view(self) -> LoopView:
        ages = {request_id: self._clock() - live.accepted_at for request_id, live in self._live.items()}
        return LoopView.of(self._scheduler, ages, self._occupancy, self._pace)

    # The loop's own thread

    def _run(self) -> None:
        while True:
            patience = self._wait_s()
            if patience == 0.0:  # checked between jobs, since a busy loop's inbox may never be empty
                self._do(self._check_deadlines)
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
        except Exception as e:  # top of the thread: requests must end with an error, not wait for ever
            log.exception("engine loop: job failed")
            self._suspect(MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))
        self.post.deliver()
        if self.journal:
            self.journal.flush()  # after delivery, so that a slow disk does not delay readers

    def _wait_s(self) -> float | None:
        """Return the seconds until a frame or a request is overdue; None if there is no deadline."""
        due = min((t for t in (self._frame_due(), self._scheduler.next_deadline()) if t is not None), default=None)
        return None if due is None else max(0.0, due - self._clock())

    def _frame_due(self) -> float | None:
        """Return the time by which the oldest frame in the ring must be back; None if the ring is empty."""
        oldest = self._scheduler.oldest() if self._ring else None
        return self.patience.due_at(*oldest, extra_s(self._lag())) if oldest else None

    def _check_deadlines(self) -> None:
        """End requests whose deadline has passed, and treat the ring as lost if a frame is overdue."""
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
        samples = split_samples(request)
        active = ActiveRequest(request, answer)
        try:
            if request.id in self._requests:
                raise InvalidRequest(f"a request with the id {request.id} is already live", field="request_id")
            self._scheduler.submit(*samples, said=said)
        except MacpipeError as e:
            answer.put(e)
            return
        self._flush()
        now = self._clock()
        self._requests[request.id] = active
        for i, sample in enumerate(samples):
            active.live.add(sample.id)
            text = AnswerText(request, self._decoder(), self._parser)
            tally = RequestTimings(now, self._plan.stages)
            self._live[sample.id] = ActiveSample(active, sample, i, text, tally, now, skip[i] if skip else 0)
        answer.put(Accepted())
        if self.journal:
            self.journal.record_opened(request, said)
        for sample, tokens in zip(samples, said, strict=False):
            self._live[sample.id].say_again(tokens)

    def _end(self, request_id: str, error: MacpipeError) -> bool:
        """End a request and all its samples. ``request_id`` may be the id of a sample. Return whether it was live."""
        live = self._live.get(request_id)
        active = live.asked if live else self._requests.get(request_id)
        if active is None:
            return False
        del self._requests[active.request.id]
        for sample in sorted(active.live):
            del self._live[sample]
            try:
                self._scheduler.end(sample)
            except RequestNotFound:
                log.debug("engine loop: sample already left the scheduler request=%s", sample)
        self._flush()
        active.answer.put(error)
        if self.journal:
            self.journal.record_ended(active.request.id)
        return True

    def _on_frame(self, message: bytes) -> None:
        if not self._ring:
            return
        try:
            frame = decode(message)
            if frame.epoch < self._plan.epoch:
                return  # from a stage that does not know of the new epoch yet
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
                self._handle_safely(live, event, now)

    def _handle_safely(self, live: ActiveSample, event: Produced | SampleFailed, now: float) -> None:
        try:
            self._handle(live, event, now)
        except Exception as e:  # a tokenizer may raise anything; only this request ends
            log.exception("engine loop: event failed request=%s", live.request.id)
            self._end(live.request.id, MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))

    def _handle(self, live: ActiveSample, event: Produced | SampleFailed, now: float) -> None:
        if isinstance(event, Produced):
            self.proven = self._plan.epoch
            live.tally.token(now)
            self._on_token(live, event)
            return
        worker = self._plan.stages[event.stage].worker if event.stage < len(self._plan.stages) else "a stage"
        self._end(live.request.id, MacpipeError.of(event.reason, f"{worker}: {event.sentence}", worker=worker))

    def _on_token(self, live: ActiveSample, produced: Produced) -> None:
        finish = produced.finish
        live.replays = 0
        if produced.counts:
            self.totals.tokens += 1
            if self.journal:
                self.journal.record_token(live.asked.request.id, produced.sample.token, live.sample)
            if not live.say(produced.index, produced.sample, produced.cached):
                self._end(
                    live.request.id, SlowReader("the client reads its tokens too slowly, so its request was ended")
                )
                return
        if live.text.stopped and finish is not FinishReason.STOP:
            finish = FinishReason.STOP
            self._leave_scheduler(live)
        if finish:
            completion_tokens = produced.index + produced.counts
            self._finish(live, finish, Usage(len(live.request.prompt), completion_tokens, produced.cached))

    def _leave_scheduler(self, live: ActiveSample) -> None:
        try:
            self._scheduler.end(live.request.id)
        except RequestNotFound:
            return  # the same token also reached max_tokens, so the scheduler ended it
        self._flush()

    def _finish(self, live: ActiveSample, reason: FinishReason, usage: Usage) -> None:
        last = live.finish(reason, usage)
        del self._live[live.request.id]
        live.asked.live.remove(live.request.id)
        if not live.asked.live:
            del self._requests[live.asked.request.id]
        self.totals.finished += 1
        live.asked.answer.put(last)
        if self.journal and not live.asked.live:
            self.journal.record_ended(live.asked.request.id)

    # Loss and replacement of rings

    def _on_stream_lost(self, epoch: int, loss: WorkerLost) -> None:
        self._loss = (epoch, loss)  # the ring may be open but not in use yet; _resume checks this
        if epoch == self._plan.epoch:
            self._suspect(loss)

    def _suspect(self, cause: MacpipeError) -> None:
        """Close the ring and report its loss, once per ring."""
        if self._ring:
            self._close_ring()
            self._broken(cause)

    def _resume(self, plan: Plan, capacity: Capacity, ring: Ring, pace: StepTimes | None) -> None:
        self._close_ring()
        self._ring, self._refusal = ring, None
        self._begin_epoch(plan, pace)
        for refused in self._scheduler.begin_epoch(plan.epoch, capacity):
            self._end(
                refused.request_id, WorkerLost(f"the remaining Macs cannot hold this request: {refused.sentence}")
            )
        for live in tuple(self._live.values()):
            live.tally.go_on(plan.stages)
            live.replays += 1
            if live.replays > MAX_REPLAYS:
                self._end(
                    live.request.id, WorkerLost(f"a stage was lost {MAX_REPLAYS} times in a row during this request")
                )
        if self._loss and self._loss[0] == plan.epoch:
            self._suspect(self._loss[1])
        self._flush()

    def _refuse(self, error: MacpipeError) -> None:
        self._refusal = error
        self._close_ring()
        for request_id in tuple(self._requests):
            self._end(request_id, error)

    def _close_ring(self) -> None:
        if self._ring:
            self._ring.close()
        self._ring = None
