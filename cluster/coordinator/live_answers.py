"""Answer the live requests of an engine loop: send their tokens to their readers, and end them.

It runs on the loop's thread. It knows requests, text and the journal; it refuses to know the ring.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain

from cluster.coordinator.active_requests import (
    ActiveRequest,
    ActiveSample,
    MovedRequest,
    ResumedRequest,
    split_samples,
)
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_text import Decoder
from cluster.coordinator.frame_history import FrameHistory
from cluster.coordinator.journal import AnswerRecorder, AnswerTokens
from cluster.coordinator.loop_view import AnswerProgress
from cluster.coordinator.request_timings import LoopTotals, RequestTimings
from cluster.core.errors import (
    Aborted,
    Busy,
    InvalidRequest,
    MacpipeError,
    NotLeader,
    NotServing,
    RequestNotFound,
    SlowReader,
    WorkerLost,
)
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import MAX_REPLAYS, RETRY_AFTER_S
from cluster.core.plan import PlannedStage
from cluster.core.request import Accepted, FinishReason, Request, TokenEvent, Usage
from cluster.scheduler.outcome import Outcome, Produced, PromptScored, SampleFailed
from cluster.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)


class LiveAnswers:
    """The live requests of one engine loop. They outlive rings.

    ``flush`` sends the frames that the scheduler can write after a sample has left it. ``later`` calls a function again
    after what came before it. ``history`` is told when a sample is accepted, and when it ends.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        flush: Callable[[], None],
        later: Callable[[Callable[[], None]], object],
        decoder: Callable[[], Decoder],
        clock: Callable[[], float],
        history: FrameHistory,
    ) -> None:
        self._history = history
        self._scheduler, self._flush, self._later = scheduler, flush, later
        self._decoder, self._clock = decoder, clock
        self._requests: dict[str, ActiveRequest] = {}
        self._resumed: dict[str, ResumedRequest] = {}
        """Requests that are not scheduled yet."""
        self._samples: dict[str, ActiveSample] = {}
        self.ended_at = clock()
        """When a client's request ended last. Any thread may ask."""
        self.totals = LoopTotals()
        self.journal: AnswerRecorder | None = None

    def __len__(self) -> int:
        """Return the number of live requests. Any thread may ask."""
        return len(self._requests) + len(self._resumed)

    def open(
        self,
        request: Request,
        answer: AnswerQueue,
        tokens: AnswerTokens,
        known: tuple[KnownTokens, ...],
        stages: Callable[[], Sequence[PlannedStage]],
    ) -> None:
        """Schedule a request. A refusal goes to ``answer``, as all its events do. End the requests that it displaces.

        ``tokens`` and ``known`` are as in ``EngineLoop.submit``; ``stages`` returns those of the current epoch. A
        resumed request is scheduled once its tokens are decoded, a few at a time: no other request waits for that.
        """
        if request.id in self._requests or request.id in self._resumed:
            answer.put(InvalidRequest(f"a request with the id {request.id} is already live", field="request_id"))
            return
        resumed = ResumedRequest(request, answer, tokens, known, self._decoder)
        self._resumed[request.id] = resumed
        self._continue(resumed, stages)

    def _continue(self, resumed: ResumedRequest, stages: Callable[[], Sequence[PlannedStage]]) -> None:
        """Decode the next tokens of a resumed request, and schedule it after the last ones."""
        if self._resumed.get(resumed.request.id) is not resumed:
            return  # it has ended
        try:
            more = resumed.decode()
        except MacpipeError as e:
            self.end(resumed.request.id, e)
            return
        except Exception as e:  # a tokenizer may raise anything; only this request ends
            log.exception("answers: tokens not decoded request=%s", resumed.request.id)
            self.end(resumed.request.id, MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))
            return
        if more:
            self._later(lambda: self._continue(resumed, stages))
            return
        del self._resumed[resumed.request.id]
        self._schedule(resumed, stages())

    def _schedule(self, resumed: ResumedRequest, stages: Sequence[PlannedStage]) -> None:
        request, answer = resumed.request, resumed.answer
        samples = split_samples(request)
        active = ActiveRequest(request, answer)
        began = self._clock()  # before its first frame is sent
        try:
            displaced = self._scheduler.submit(*samples, answers=resumed.tokens)
        except MacpipeError as e:
            answer.put(e)
            return
        for refused in displaced:
            self.end(refused.request_id, Busy(refused.sentence, retry_after_s=RETRY_AFTER_S))
        self._flush()
        now = self._clock()
        self._requests[request.id] = active
        for i, sample in enumerate(samples):
            active.live.add(sample.id)
            timings = RequestTimings(now, stages)
            self._history.accept(sample.id, request.client, len(request.prompt), began)
            text, check = resumed.texts[i], resumed.checks[i]
            self._samples[sample.id] = ActiveSample(active, sample, i, text, timings, now, check)
        answer.put(Accepted())
        self._record_opened(request, resumed.tokens)
        if known := tuple(chain.from_iterable(resumed.events)):
            answer.put_uncounted(*known)

    def _record_opened(self, request: Request, tokens: AnswerTokens) -> None:
        if self.journal and not (request.embeds or request.is_canary):  # these end with their first token
            self.journal.record_opened(request, tokens)

    def detach(self, request_id: str, client: str, error: MacpipeError) -> bool:
        """End a resumable request of ``client``, so that the journal has it. Return whether it was live."""
        resumed, active = self._resumed.get(request_id), self._requests.get(request_id)
        request = resumed.request if resumed else active.request if active else None
        if request is None or request.client != client or not request.resumable:
            return False
        self.end(request_id, error, park=True)
        self.flush_journal()
        return True

    def abandon(self, request_id: str, answer: AnswerQueue) -> bool:
        """End the request of an answer that nobody reads any more; the journal keeps it. Return whether it was live.

        A client that has resumed the request reads another answer meanwhile, and that one goes on.
        """
        live = self._resumed.get(request_id) or self._requests.get(request_id)
        if live is None or live.answer is not answer:
            return False
        return self.end(request_id, Aborted("the client disconnected"), park=True)

    def end(self, request_id: str, error: MacpipeError, *, park: bool = False) -> bool:
        """End a request and all its samples. ``request_id`` may be the id of a sample. Return whether it was live.

        ``park``: if it is resumable, the journal keeps it, with the tokens so far.
        """
        if resumed := self._resumed.pop(request_id, None):
            resumed.answer.put(error)
            return True
        live = self._samples.get(request_id)
        active = live.parent if live else self._requests.get(request_id)
        if active is None:
            return False
        self._remove(active)
        for sample in sorted(active.live):
            del self._samples[sample]
            self._history.end(sample, self._clock())
            try:
                self._scheduler.end(sample)
            except RequestNotFound:
                log.debug("answers: sample already left the scheduler sample=%s", sample)
        self._flush()
        active.answer.put(error)
        self._record_end(active.request, park=park or isinstance(error, NotServing | NotLeader))
        return True

    def _remove(self, active: ActiveRequest) -> None:
        """Remove a request that has ended."""
        del self._requests[active.request.id]
        if not active.request.is_canary:
            self.ended_at = self._clock()

    def _record_end(self, request: Request, *, park: bool) -> None:
        if self.journal is None:
            return
        if park and request.resumable:
            self.journal.record_parked(request.id)
        else:
            self.journal.record_ended(request.id)

    def end_all(self, error: MacpipeError) -> None:
        """End every live request with ``error``."""
        for request_id in (*self._requests, *self._resumed):
            self.end(request_id, error)

    def end_adapter(self, adapter: str, error: MacpipeError) -> int:
        """End every live request that an adapter answers. Return how many there were."""
        live = (*(r.request for r in self._requests.values()), *(r.request for r in self._resumed.values()))
        return sum(self.end(request.id, error) for request in live if request.adapter == adapter)

    def hand_over(self, ids: Collection[str] | None) -> list[MovedRequest]:
        """Give up the requests with these ids, all of them if None, so that another loop can go on with them.

        A canary stays: it proves the stages of this loop.
        """
        given = [live for live in self._requests.values() if _may_move(live.request, ids)]
        leaving = {s: self._samples.pop(s) for active in given for s in sorted(active.live)}
        states = {moved.request.id: moved for moved in self._scheduler.hand_over(list(leaving))}
        found = []
        for active in given:
            del self._requests[active.request.id]
            samples = [(leaving[s], states[s]) for s in sorted(active.live) if s in states]
            found.append(MovedRequest(active.request, active.answer, tuple(samples)))
        for resumed in [one for one in self._resumed.values() if _may_move(one.request, ids)]:
            del self._resumed[resumed.request.id]
            found.append(MovedRequest(resumed.request, resumed.answer, (), resumed.tokens, resumed.known))
        for sample in leaving:
            self._history.end(sample, self._clock())
        self._flush()
        return found

    def take_over(self, moved: Sequence[MovedRequest], stages: Sequence[PlannedStage]) -> list[MovedRequest]:
        """Go on with requests of another loop that have live samples.

        Return those that cannot be answered here: they never fit, or another request has their id.
        """
        here = {*self._requests, *self._resumed}
        left = [one for one in moved if one.request.id in here]
        offered = [one for one in moved if one.request.id not in here]
        states = [state for one in offered for _, state in one.samples]
        refused = {state.request.id for state in self._scheduler.take_over(states)}
        for one in offered:
            ids = [state.request.id for _, state in one.samples]
            if refused.isdisjoint(ids):
                self._adopt(one, stages)
            else:
                self._scheduler.hand_over(ids)
                left.append(one)
        self._flush()
        return left

    def _adopt(self, moved: MovedRequest, stages: Sequence[PlannedStage]) -> None:
        request, now = moved.request, self._clock()
        active = self._requests[request.id] = ActiveRequest(request, moved.answer)
        answers: list[tuple[int, ...]] = [()] * request.samples
        for live, state in moved.samples:
            active.live.add(live.request.id)
            live.parent = active
            self._samples[live.request.id] = live
            self._history.accept(live.request.id, request.client, len(request.prompt), now)
            answers[live.sample] = state.answer
        self._record_opened(request, tuple(answers))
        for live, _ in moved.samples:
            self._begin_epoch(live, stages)

    def begin_epoch(self, stages: Sequence[PlannedStage]) -> None:
        """Continue on the stages of a new epoch. End requests that have lost ``MAX_REPLAYS`` rings in a row."""
        for live in tuple(self._samples.values()):
            self._begin_epoch(live, stages)

    def _begin_epoch(self, live: ActiveSample, stages: Sequence[PlannedStage]) -> None:
        live.timings.begin_epoch(stages)
        live.replays += 1
        if live.replays > MAX_REPLAYS:
            loss = WorkerLost(f"a stage was lost {MAX_REPLAYS} times in a row during this request")
            self.end(live.request.id, loss)

    def progress(self) -> dict[str, AnswerProgress]:
        """Return how far each live sample is, by its id."""
        now = self._clock()
        return {sample_id: live.progress(now) for sample_id, live in self._samples.items()}

    def flush_journal(self) -> None:
        """Write the records since the last call to the journal, if there is one."""
        if self.journal:
            self.journal.flush()

    def handle(self, outcome: Outcome, now: float, stages: Sequence[PlannedStage]) -> bool:
        """Count a frame's times and send its tokens to their readers. Return whether a live request got a token."""
        for request_id in outcome.request_ids:
            if live := self._samples.get(request_id):
                live.timings.frame(outcome, now)
        got_token = False
        for event in outcome.events:
            if live := self._samples.get(event.request_id):
                got_token = got_token or isinstance(event, Produced)
                self._handle_safely(live, event, now, stages)
        return got_token

    def _handle_safely(
        self,
        live: ActiveSample,
        event: Produced | SampleFailed | PromptScored,
        now: float,
        stages: Sequence[PlannedStage],
    ) -> None:
        try:
            if isinstance(event, PromptScored):
                live.parent.answer.put_uncounted(event.logprobs)
                return
            if isinstance(event, Produced):
                live.timings.token(now)
                self._on_token(live, event)
                return
            worker = stages[event.stage].worker if event.stage < len(stages) else "a stage"
            self.end(live.request.id, MacpipeError.of(event.reason, f"{worker}: {event.sentence}", worker=worker))
        except MacpipeError as e:
            self.end(live.request.id, e)
        except Exception as e:  # a tokenizer may raise anything; only this request ends
            log.exception("answers: event failed request=%s", live.request.id)
            self.end(live.request.id, MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))

    def _on_token(self, live: ActiveSample, produced: Produced) -> None:
        finish = produced.finish
        live.replays = 0
        live.guesses.add(produced)
        if produced.counts:
            if not live.request.is_canary:
                self.totals.count_token(produced.index, live.sample, len(live.request.prompt), produced.cached)
            if self.journal:
                self.journal.record_token(live.parent.request.id, produced.sample.token, live.sample)
            if not live.send_token(produced):
                why = SlowReader("the client reads its tokens too slowly, so its request was ended")
                self.end(live.request.id, why)
                return
        if live.text.stopped and finish is not FinishReason.STOP:
            finish = FinishReason.STOP
            self._leave_scheduler(live)
        if finish:
            completion_tokens = produced.index + produced.counts
            predicted = live.guesses.accepted_predictions, live.guesses.rejected_predictions
            usage = Usage(len(live.request.prompt), completion_tokens, produced.cached, *predicted)
            self._finish(live, finish, usage, _end_token(live, produced))

    def _leave_scheduler(self, live: ActiveSample) -> None:
        try:
            self._scheduler.end(live.request.id)
        except RequestNotFound:
            return  # the same token also reached max_tokens, so the scheduler ended it
        self._flush()

    def _finish(self, live: ActiveSample, reason: FinishReason, usage: Usage, end: TokenEvent | None) -> None:
        live.known.close()
        last = replace(live.finish(reason, usage), end=end)
        del self._samples[live.request.id]
        self._history.end(live.request.id, self._clock())
        live.parent.live.remove(live.request.id)
        if not live.parent.live:
            self._remove(live.parent)
        self.totals.finished += not live.request.is_canary
        live.parent.answer.put(last)
        if not live.parent.live:
            self._record_end(live.parent.request, park=True)  # the reader may never see the end


def _may_move(request: Request, ids: Collection[str] | None) -> bool:
    return not request.is_canary and (ids is None or request.id in ids)


def _end_token(live: ActiveSample, produced: Produced) -> TokenEvent | None:
    """Return the end-of-sequence token that ended an answer; None if something else did."""
    if produced.counts or produced.finish is not FinishReason.STOP:
        return None
    sampled = produced.sample
    return TokenEvent(produced.index, sampled.token, "", sampled.logprob, sampled.top, sample=live.sample)
