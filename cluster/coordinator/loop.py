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
from dataclasses import dataclass, replace

from cluster.chat import Parsing
from cluster.coordinator.answer import Answer
from cluster.coordinator.occupancy import Occupancy
from cluster.coordinator.pace import Pace
from cluster.coordinator.ring import Ring
from cluster.coordinator.samples import Asked, requests_of
from cluster.coordinator.tally import Tally
from cluster.coordinator.text import Decoder, Parser, Speech, plain
from cluster.coordinator.views import LoopView, viewed
from cluster.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MacpipeError,
    NotServing,
    RequestNotFound,
    SlowReader,
    WorkerLost,
)
from cluster.limits import FRAME_TIMEOUT_S
from cluster.scheduler.outcome import Failed, Outcome, Produced
from cluster.scheduler.scheduler import Scheduler
from cluster.types import Accepted, FinishEvent, FinishReason, Plan, Request, TokenEvent, Usage
from cluster.wire.frame import decode, encode

log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(slots=True)
class _Live:
    """What the loop keeps of a request beside the scheduler's own record."""

    asked: Asked
    request: Request
    sample: int
    text: Speech
    tally: Tally
    accepted_at: float


@dataclass(slots=True)
class Totals:
    """Complete answers and their tokens, over a coordinator's life."""

    finished: int = 0
    tokens: int = 0


class EngineLoop:
    """Runs one epoch. ``broken`` is told once, on the loop's thread, when the ring is lost.

    Until somebody then calls ``fail`` with the cause, requests wait: nothing is sent, none has ended.
    """

    def __init__(
        self,
        plan: Plan,
        scheduler: Scheduler,
        decoder: Callable[[], Decoder],
        broken: Callable[[MacpipeError], None],
        clock: Clock = time.monotonic,
        pace: Pace | None = None,
        parser: Callable[[Parsing], Parser] = plain,
    ) -> None:
        self._plan, self._scheduler, self._decoder, self._broken, self._clock = plan, scheduler, decoder, broken, clock
        self._parser = parser
        self._asked: dict[str, Asked] = {}
        # Bounded by what feeds it: frames by the ring's window, requests by the open calls.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}
        self._ring: Ring | None = None
        self._suspicion: MacpipeError | None = None
        self._over: MacpipeError | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._totals = Totals()
        self._occupancy = Occupancy(len(plan.stages))
        self._pace = pace

    # Called from other threads

    def start(self, ring: Ring) -> None:
        self._ring = ring
        self._thread.start()

    def count_into(self, totals: Totals) -> None:
        """From now on, add to these; what came before (a canary) counts nowhere."""
        self._totals = totals

    def submit(self, request: Request, answer: Answer) -> None:
        """Take a request; everything that becomes of it, refusal too, goes to ``answer``."""
        self._inbox.put(lambda: self._submit(request, answer))

    def end(self, request_id: str, error: MacpipeError) -> Future[bool]:
        """End a request with an error; the future says whether it was live."""
        future: Future[bool] = Future()
        self._inbox.put(lambda: future.set_result(self._end(request_id, error)))
        return future

    def received(self, message: bytes) -> None:
        """A frame from the last stage."""
        self._inbox.put(lambda: self._returned(message))

    def lost(self, worker: str, why: str) -> None:
        """A stream of the ring broke."""
        self._inbox.put(lambda: self._suspect(WorkerLost(f"{worker}: {why}", worker=worker)))

    def fail(self, error: MacpipeError) -> None:
        """The epoch is over: every live request ends with ``error``."""
        self._inbox.put(lambda: self._fail(error))

    def stop(self, error: MacpipeError) -> None:
        """End what is live with ``error``, then the thread; returns when both are done."""
        self._inbox.put(lambda: self._fail(error))
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def view(self) -> Future[LoopView]:
        """Everything under way, as the loop's thread sees it."""
        future: Future[LoopView] = Future()
        self._inbox.put(lambda: future.set_result(self._view()))
        return future

    def _view(self) -> LoopView:
        scheduler, now = self._scheduler, self._clock()
        requests = (
            viewed(s, now - live.accepted_at) for s in scheduler.sequences if (live := self._live.get(s.request.id))
        )
        return LoopView(
            requests=tuple(requests),
            lane_sizes=scheduler.lane_sizes,
            reserved_bytes=scheduler.reserved,
            prefix_bytes=scheduler.prefixes.used,
            prefixes=len(scheduler.prefixes),
            bubbles=self._occupancy.bubbles(),
            pace=self._pace.stages() if self._pace else (),
            busy_s=self._occupancy.busy_s,
            active_s=self._occupancy.active_s,
        )

    # The loop's own thread

    def _run(self) -> None:
        while True:
            patience = self._patience()
            if patience == 0.0:  # looked at between any two jobs: a busy loop's inbox is never empty
                self._do(self._look_at_the_clock)
                patience = self._patience()
            try:
                job = self._inbox.get(timeout=patience)
            except queue.Empty:
                continue
            if job is None:
                return
            self._do(job)

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as e:  # the thread's edge: a request must end with an error rather than wait for ever
            log.exception("the engine loop failed")
            self._suspect(MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))

    def _patience(self) -> float | None:
        """Seconds until a frame or a request is overdue; None where neither can be."""
        if self._suspicion or self._over:
            return None
        sent_at, deadline = self._scheduler.oldest_sent_at(), self._scheduler.next_deadline()
        frame_due = None if sent_at is None else sent_at + FRAME_TIMEOUT_S
        due = min((t for t in (frame_due, deadline) if t is not None), default=None)
        return None if due is None else max(0.0, due - self._clock())

    def _look_at_the_clock(self) -> None:
        """End requests whose deadline has passed, and the epoch where a frame is overdue."""
        now = self._clock()
        for request_id in self._scheduler.overdue(now):
            self._end(request_id, DeadlineExceeded(f"the deadline of request {request_id} passed"))
        sent_at = self._scheduler.oldest_sent_at()
        if sent_at is not None and sent_at + FRAME_TIMEOUT_S <= now:
            self._suspect(WorkerLost(f"no stage answered a frame within {FRAME_TIMEOUT_S:.0f} s"))

    def _flush(self) -> None:
        if self._suspicion or self._over or not self._ring:
            return
        for frame in self._scheduler.next_frames(self._clock()):
            self._ring.send(encode(frame))

    def _submit(self, request: Request, answer: Answer) -> None:
        if self._over:
            answer.put(NotServing(f"the model is not being served: {self._over.sentence}"))
            return
        samples, asked = requests_of(request), Asked(request, answer)
        try:
            if request.id in self._asked:
                raise InvalidRequest(f"a request with the id {request.id} is already live", field="request_id")
            self._scheduler.submit(*samples)
        except MacpipeError as e:
            answer.put(e)
            return
        self._flush()
        now = self._clock()
        self._asked[request.id] = asked
        for i, sample in enumerate(samples):
            asked.live.add(sample.id)
            text = Speech(request, self._decoder(), self._parser)
            self._live[sample.id] = _Live(asked, sample, i, text, Tally(now, self._plan.stages), now)
        answer.put(Accepted())

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
        return True

    def _returned(self, message: bytes) -> None:
        if self._suspicion or self._over:
            return
        try:
            outcome = self._scheduler.returned(decode(message))
        except MacpipeError as e:
            self._suspect(e)
            return
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

    def _tell_safely(self, live: _Live, event: Produced | Failed, now: float) -> None:
        try:
            self._tell(live, event, now)
        except Exception as e:  # a tokenizer may raise anything; that ends its own request and nobody else's
            log.exception("request %s failed", live.request.id)
            self._end(live.request.id, MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))

    def _tell(self, live: _Live, event: Produced | Failed, now: float) -> None:
        if isinstance(event, Produced):
            live.tally.token(now)
            self._produced(live, event)
            return
        worker = self._plan.stages[event.stage].worker if event.stage < len(self._plan.stages) else "a stage"
        self._end(live.request.id, MacpipeError.of(event.reason, f"{worker}: {event.sentence}", worker=worker))

    def _produced(self, live: _Live, produced: Produced) -> None:
        finish = produced.finish
        if produced.counts:
            self._totals.tokens += 1
            said, sample = live.text.add(produced.sample.token), produced.sample
            event = TokenEvent(
                produced.index,
                sample.token,
                said.text,
                sample.logprob,
                sample.top,
                reasoning=said.reasoning,
                calls=said.calls,
                sample=live.sample,
            )
            if not live.asked.answer.put(event):
                self._end(live.request.id, SlowReader("the client did not read its tokens, so the answer was ended"))
                return
        if live.text.stopped and finish is not FinishReason.STOP:
            finish = FinishReason.STOP
            self._leave(live)
        if finish:
            self._finish(
                live, finish, Usage(len(live.request.prompt), produced.index + produced.counts, produced.cached)
            )

    def _leave(self, live: _Live) -> None:
        """A stop string ended an answer that the scheduler believes alive."""
        try:
            self._scheduler.end(live.request.id)
        except RequestNotFound:
            return  # its last token was also its longest allowed
        self._flush()

    def _finish(self, live: _Live, reason: FinishReason, usage: Usage) -> None:
        rest, reason = live.text.finish(reason)
        del self._live[live.request.id]
        live.asked.live.remove(live.request.id)
        if not live.asked.live:
            del self._asked[live.asked.request.id]
        self._totals.finished += 1
        ttft, tpot, figures = live.tally.ttft_ms, live.tally.tpot_ms, live.tally.figures()
        finish = FinishEvent(reason, rest.text, usage, ttft, tpot, figures, rest.reasoning, rest.calls, live.sample)
        live.asked.answer.put(replace(finish, stop=live.text.stopped_by))

    def _suspect(self, cause: MacpipeError) -> None:
        """The ring is lost: stop, and have the cause looked into."""
        if self._suspicion or self._over:
            return
        self._suspicion = cause
        self._close_ring()
        self._broken(cause)

    def _fail(self, error: MacpipeError) -> None:
        """The epoch is over: every live request ends, once, with the cause."""
        if self._over:
            return
        self._over = error
        self._close_ring()
        for asked in self._asked.values():
            asked.answer.put(error)
        self._asked.clear()
        self._live.clear()

    def _close_ring(self) -> None:
        if self._ring:
            self._ring.close()
