"""Run the engine loop: one thread that drives the scheduler and the ring.

Frames, requests and losses arrive in one inbox, in one order. Nothing else touches the scheduler. When a frame comes
back, the loop sends the next frames first and handles the answers afterwards (``live_answers``), so that detokenizing
does not delay the ring.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

from cluster.coordinator.active_requests import MovedRequest
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.answer_text import Decoder
from cluster.coordinator.frame_history import FrameHistory, FramesCopy
from cluster.coordinator.job_queue import Job, JobQueue
from cluster.coordinator.journal import AnswerTokens
from cluster.coordinator.live_answers import LiveAnswers
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.ring import Ring
from cluster.coordinator.stage_utilization import StageUtilization
from cluster.coordinator.step_times import StepTimes
from cluster.core.errors import (
    Aborted,
    DeadlineExceeded,
    FrameOverdue,
    InvalidGrammar,
    MacpipeError,
    NotServing,
    WorkerLost,
)
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import GRAMMAR_WAIT_S, LOOP_STOP_S, SUSPECT_S
from cluster.core.plan import Plan
from cluster.core.request import Grammar, Request
from cluster.membership.frame_deadlines import FrameDeadlines
from cluster.membership.slowness import extra_s
from cluster.platform.overload import Lag, no_lag
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.disk_prefixes import DiskContents, DiskRead, ReadOutcome
from cluster.scheduler.kv_cost import Cost
from cluster.scheduler.outcome import Outcome
from cluster.scheduler.routing import Offer
from cluster.scheduler.scheduler import Scheduler
from cluster.wire.frame_codec import decode, encode

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs one model through any number of epochs. Calls ``broken`` on the loop's thread when a ring is lost.

    While there is no ring, requests wait: the loop sends nothing, ends no request and accepts new ones. ``continue_on``
    goes on with every answer on a new ring. ``refuse`` ends all live requests, and rejects new ones until then.
    """

    def __init__(
        self,
        plan: Plan,
        scheduler: Scheduler,
        decoder: Callable[[], Decoder],
        broken: Callable[[MacpipeError], None],
        clock: Callable[[], float] = time.monotonic,
        step_times: StepTimes | None = None,
        lag: Lag = no_lag,
        read_prefix: Callable[[DiskRead], None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._read_prefix = read_prefix
        self._broken, self._clock, self._lag = broken, clock, lag
        self.deadlines = FrameDeadlines(clock())
        self._history = FrameHistory()
        self.answers = LiveAnswers(
            scheduler, self._flush, lambda step: self._inbox.put(step), decoder, clock, self._history
        )
        self._inbox = JobQueue()
        self.post = EventBatch()  # events of all answers; delivered after each job
        self._ring: Ring | None = None
        self._loss: tuple[int, WorkerLost] | None = None
        self._refusal: MacpipeError | None = None
        self._judging = False
        """Whether ``_judge_overdue`` is among the jobs."""
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self.proven = 0  # the last epoch that produced a token
        self._begin_epoch(plan, step_times)

    def _begin_epoch(self, plan: Plan, step_times: StepTimes | None) -> None:
        self._plan, self._stages, self._step_times = plan, plan.pipeline, step_times
        self._utilization = StageUtilization(len(self._stages))
        self._history.begin_epoch(plan.epoch, self._stages)
        self.deadlines = FrameDeadlines(self._clock(), overdue=self.deadlines.overdue)

    # Called from other threads

    def start(self, ring: Ring, disk: DiskContents | None = None) -> None:
        """Start the thread with the first epoch's ring, and what its stages have on disk."""
        self._ring = ring
        self._scheduler.disk.open(disk)
        self._thread.start()

    def continue_on(
        self,
        plan: Plan,
        capacity: Capacity,
        ring: Ring,
        step_times: StepTimes | None = None,
        disk: DiskContents | None = None,
    ) -> None:
        """Continue with a new epoch's ring, whose stages hold no caches but those on their disks."""
        self._inbox.put(lambda: self._continue_on(plan, capacity, ring, step_times, disk))

    def hold(self) -> None:
        """Close the ring and keep requests waiting until ``continue_on`` or ``refuse``."""
        self._inbox.put(self._close_ring)

    def submit(
        self, request: Request, answer: AnswerQueue, tokens: AnswerTokens = (), known: tuple[KnownTokens, ...] = ()
    ) -> None:
        """Queue a request. All its events, including a refusal, go to ``answer``.

        For a resumed request, ``tokens`` holds the tokens of each sample so far, and ``known`` those of them that the
        reader already has. Raises ``NotServing`` after ``stop``.
        """
        if not self._inbox.put(lambda: self._submit(request, answer, tokens, known)):
            raise NotServing("the model is no longer served; send the request again once a model is loaded")

    def make_offer(self, request: Request) -> Future[Offer]:
        """Return a future of what this loop can do for a request now."""
        return self._inbox.ask(lambda: self._scheduler.offers.make(request, self._clock()))

    def hand_over(self, ids: Collection[str] | None = None) -> Future[list[MovedRequest]]:
        """Give up the requests with these ids, all of them if None, so that another loop can ``take_over`` them.

        All their events so far have been delivered once the future is done. Its result must not be dropped.
        """
        return self._inbox.ask(lambda: self._hand_over(ids))

    def _hand_over(self, ids: Collection[str] | None) -> list[MovedRequest]:
        moved = self.answers.hand_over(ids)
        self._deliver()
        return moved

    def take_over(self, moved: Sequence[MovedRequest]) -> Future[list[MovedRequest]]:
        """Go on with requests of another loop, whose answers write to ``post`` now.

        The future has those that cannot be answered here.
        """
        return self._inbox.ask(lambda: self._take_over(moved))

    def _take_over(self, moved: Sequence[MovedRequest]) -> list[MovedRequest]:
        if self._refusal:
            return list(moved)
        for one in moved:
            if not one.samples:
                self.answers.open(one.request, one.answer, one.tokens, one.known, lambda: self._stages)
        return self.answers.take_over([one for one in moved if one.samples], self._stages)

    def end(self, request_id: str, error: MacpipeError) -> Future[bool]:
        """End a request with an error, as ``LiveAnswers.end``. The future resolves to whether the request was live."""
        return self._inbox.ask(lambda: self.answers.end(request_id, error))

    def abandon(self, request_id: str, answer: AnswerQueue) -> Future[bool]:
        """End a request whose ``answer`` nobody reads any more, as ``LiveAnswers.abandon``."""
        return self._inbox.ask(lambda: self.answers.abandon(request_id, answer))

    def detach(self, request_id: str, client: str, error: MacpipeError) -> Future[bool]:
        """End a request that its client resumes, as ``LiveAnswers.detach``."""
        return self._inbox.ask(lambda: self.answers.detach(request_id, client, error))

    def end_adapter(self, adapter: str, error: MacpipeError) -> Future[int]:
        """End the requests of an adapter with an error, and drop its prefixes. The future resolves to their number."""
        return self._inbox.ask(lambda: self._end_adapter(adapter, error))

    def _end_adapter(self, adapter: str, error: MacpipeError) -> int:
        ended = self.answers.end_adapter(adapter, error)
        self._scheduler.adapters.forget(adapter)
        self._flush()
        return ended

    def take_adapter_memory(self, epoch: int, taken: Cost) -> Future[bool]:
        """Take bytes of each stage's caches for adapters. The future has False if live requests need them.

        It also has False if another epoch has begun.
        """
        return self._inbox.ask(lambda: self._plan.epoch == epoch and self._take_adapter_memory(taken))

    def _take_adapter_memory(self, taken: Cost) -> bool:
        fits = self._scheduler.adapters.take(taken)
        self._flush()
        return fits

    def on_message(self, message: bytes) -> None:
        """Queue a frame from the last stage."""
        self._inbox.put(lambda: self._on_frame(message))

    def on_prefix_read(self, order: DiskRead, outcome: ReadOutcome, seconds: float) -> None:
        """Queue the answer to a read that ``read_prefix`` was asked for."""
        self._inbox.put(lambda: self._on_prefix_read(order, outcome, seconds))

    def on_stream_lost(self, epoch: int, worker: str, why: str) -> None:
        """Queue the loss of a stream of an epoch's ring."""
        self._inbox.put(lambda: self._on_stream_lost(epoch, WorkerLost(f"{worker}: {why}", worker=worker)))

    def suspect(self, cause: WorkerLost) -> None:
        """Treat the current ring as lost, even if its streams are open, if the worker that ``cause`` names is in it."""
        self._inbox.put(lambda: self._suspect_worker(cause))

    def refuse(self, error: MacpipeError) -> None:
        """End every live request, and every new one until ``continue_on``, with ``error``."""
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

    def advance_guesses(self, job: Callable[[], bool]) -> None:
        """Queue a job of a guesser. If it returns True, send what can be guessed now."""
        self._inbox.put(lambda: self._advance_guesses(job))

    def _advance_guesses(self, job: Callable[[], bool]) -> None:
        if job():
            self._flush()

    def forget_client(self, client: str) -> None:
        """Drop what is kept of a client's earlier answers to guess its next ones."""
        self._inbox.put(lambda: self._scheduler.speculation.forget_client(client))

    def view(self) -> Future[LoopView]:
        """Return a future of the live requests, lanes and memory, taken on the loop's thread."""
        return self._inbox.ask(self._view)

    def _view(self) -> LoopView:
        progress, now = self.answers.progress(), self._clock()
        return LoopView.of(self._scheduler, progress, self._utilization, self._step_times, now)

    def copy_frames(self) -> Future[FramesCopy]:
        """Return a future of the last frames, to trace a request."""
        return self._inbox.ask(self._history.copy)

    # The loop's own thread

    def _run(self) -> None:
        while True:
            wait_s = self._wait_s()
            if wait_s == 0.0:  # checked between jobs, since a busy loop's inbox may never be empty
                self._do(self._check_deadlines)
                wait_s = self._wait_s()
            try:
                job = self._inbox.get(wait_s)
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
        self._deliver()

    def _deliver(self) -> None:
        """Send events to their readers, and records to the journal: first, if events wait until these are stored."""
        if self.post.gate:
            self.answers.flush_journal()
            self.post.deliver()
        else:
            self.post.deliver()
            self.answers.flush_journal()  # last, so that a slow disk does not delay readers

    def _wait_s(self) -> float | None:
        """Return the seconds until a frame, a request or a grammar is overdue or asked for; None if none ever is."""
        ask_due = self._scheduler.ask_due() if self._ring else None
        times = (self._frame_due(), ask_due, self._scheduler.next_deadline())
        due = min((t for t in times if t is not None), default=None)
        return None if due is None else max(0.0, due - self._clock())

    def _frame_due(self) -> float | None:
        """Return the time by which the oldest frame in the ring must be back; None if the ring is empty.

        None, too, while ``_judge_overdue`` is to decide on it.
        """
        return None if self._judging else self._oldest_due()

    def _oldest_due(self) -> float | None:
        oldest = self._scheduler.oldest() if self._ring else None
        return self.deadlines.due_at(*oldest, extra_s(self._lag())) if oldest else None

    def _check_deadlines(self) -> None:
        """End requests that are late, have a frame judged if it is overdue, and send what is due."""
        now = self._clock()
        for request_id in self._scheduler.overdue(now):
            self.answers.end(request_id, DeadlineExceeded(f"the deadline of request {request_id} passed"))
        if (due := self._frame_due()) is not None and due <= now:
            missed = now - due > SUSPECT_S
            self._judging = self._inbox.put(lambda: self._judge_overdue(missed=missed))
        if self._ring:  # without one, no stage compiles
            for request_id, grammar in self._scheduler.late(now):
                self.answers.end(request_id, _late_grammar(grammar))
        self._flush()

    def _judge_overdue(self, *, missed: bool) -> None:
        """Treat the ring as lost if its oldest frame is overdue. All frames that had come back by then are handled.

        ``missed``: this thread did not run when the frame fell due, since the machine slept or a job took long. Then
        the frame may have come back to this machine without being read yet, so its time counts anew.
        """
        self._judging = False
        now, due = self._clock(), self._oldest_due()
        if due is None or due > now:
            return
        if missed:
            self.deadlines.excuse(now)
            return
        self.deadlines.overdue += 1
        self._suspect(FrameOverdue(f"no frame came through the stages for {now - self.deadlines.alive_at:.0f} s"))

    def _flush(self) -> None:
        if not self._ring:
            return
        for frame in self._scheduler.next_frames(self._clock()):
            self._ring.send(encode(frame))
        for frame in self._scheduler.guess_frames(self._clock()):
            self._ring.send(encode(frame))
        for order in self._scheduler.disk.take_orders():
            if self._read_prefix:
                self._read_prefix(order)

    def _on_prefix_read(self, order: DiskRead, outcome: ReadOutcome, seconds: float) -> None:
        self._scheduler.disk.finish(order, outcome, seconds)
        self._flush()

    def _submit(
        self, request: Request, answer: AnswerQueue, tokens: AnswerTokens, known: tuple[KnownTokens, ...]
    ) -> None:
        if self._refusal:
            answer.put(self._refusal)
            return
        if known:  # the client may have resumed it twice, before either was live; its first call broke
            why = f"the request {request.id} was resumed by another call"
            self.answers.detach(request.id, request.client, Aborted(why))
        self.answers.open(request, answer, tokens, known, lambda: self._stages)

    def _on_frame(self, message: bytes) -> None:
        if not self._ring:
            return
        now = self._clock()
        try:
            frame = decode(message)
            if frame.epoch < self._plan.epoch:
                return  # from a stage that does not know of the new epoch yet
            outcome = self._scheduler.on_frame(frame, now)
        except MacpipeError as e:
            self._suspect(e)
            return
        self.deadlines.learn(outcome.prefills, outcome.sent_at, now)
        self._flush()
        self._history.add(frame, outcome, now)
        self._account(outcome)

    def _account(self, outcome: Outcome) -> None:
        now = self._clock()
        self._utilization.frame(outcome.sent_at, now, outcome.timings)
        if self._step_times and outcome.rows:
            self._step_times.frame(outcome.timings, outcome.rows, outcome.context)
        if self.answers.handle(outcome, now, self._stages):
            self.proven = self._plan.epoch

    # Loss and replacement of rings

    def _on_stream_lost(self, epoch: int, loss: WorkerLost) -> None:
        self._loss = (epoch, loss)  # the ring may be open but not in use yet; _continue_on checks this
        if epoch == self._plan.epoch:
            self._suspect(loss)

    def _suspect_worker(self, cause: WorkerLost) -> None:
        if any(stage.worker == cause.details["worker"] for stage in self._plan.stages):
            self._suspect(cause)

    def _suspect(self, cause: MacpipeError) -> None:
        """Close the ring and report its loss, once per ring."""
        if self._ring:
            self._close_ring()
            self._broken(cause)

    def _continue_on(
        self,
        plan: Plan,
        capacity: Capacity,
        ring: Ring,
        step_times: StepTimes | None,
        disk: DiskContents | None,
    ) -> None:
        self._close_ring()
        self._ring, self._refusal = ring, None
        self._begin_epoch(plan, step_times)
        for refused in self._scheduler.begin_epoch(plan.epoch, capacity, disk):
            loss = WorkerLost(f"the remaining Macs cannot hold this request: {refused.sentence}")
            self.answers.end(refused.request_id, loss)
        self.answers.begin_epoch(self._stages)
        if self._loss and self._loss[0] == plan.epoch:
            self._suspect(self._loss[1])
        self._flush()

    def _refuse(self, error: MacpipeError) -> None:
        self._refusal = error
        self._close_ring()
        self.answers.end_all(error)

    def _close_ring(self) -> None:
        if self._ring:
            self._ring.close()
        self._ring = None


def _late_grammar(grammar: Grammar) -> InvalidGrammar:
    return InvalidGrammar(
        f"the {grammar.kind.value} was not compiled within {GRAMMAR_WAIT_S:.0f} s on the last stage; "
        "make it simpler, or try again when the machine has less to do",
        field=grammar.kind.value,
    )
