"""The engine loop on the in-memory network: a fault ends each request once, with its cause, and nothing waits."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from answering import Generation
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.event_gate import AnswerEvent
from cluster.coordinator.journal import Journal
from cluster.coordinator.ring import Ring, RingStage
from cluster.core.errors import (
    Aborted,
    AnswerDiffers,
    BadFrame,
    DeadlineExceeded,
    FrameOverdue,
    InvalidGrammar,
    InvalidRequest,
    MacpipeError,
    NotServing,
    SlowReader,
    StageFailed,
    WorkerLost,
)
from cluster.core.frames import Compute, Failure, Frame, Join, Leave, Sample
from cluster.core.known_tokens import KnownTokens, TokenDigest
from cluster.core.lap_times import LapTimes
from cluster.core.limits import MAX_REPLAYS, MAX_UNREAD_EVENTS
from cluster.core.plan import LayerRange, ModelRef, Plan, PlannedStage, Route, StageSpec
from cluster.core.request import (
    Accepted,
    FinishEvent,
    FinishReason,
    Grammar,
    GrammarKind,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenEvent,
)
from cluster.membership.frame_deadlines import FrameDeadlines
from cluster.platform import private_files
from cluster.scheduler import deferred, guess_chains
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.guess_window import LapMeter
from cluster.scheduler.guessing import Guess, Guesser, GuessSource
from cluster.scheduler.scheduler import Scheduler
from cluster.transport.in_memory import MemoryNetwork
from cluster.transport.streams import Line, Outbox
from cluster.wire.frame_codec import decode, encode

EPOCH = 5
HANG_S = 40
"""After this long an answer hangs: less than the test's own limit, so that the failure names what was awaited."""
BOUND = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a"))
MODEL = ModelRef("m", "", "")


class FakeStage:
    """Counts upwards: the token after n is n + 1. ``fail_at`` makes the step that feeds that token fail.

    A sequence with a grammar gets its first sample once the grammar is ``compiled``.
    """

    def __init__(self, index: int, last: bool, fail_at: int | None = None, epoch: int = EPOCH) -> None:
        self._outbox, self._index, self._last, self._fail_at = Outbox(epoch), index, last, fail_at
        self._bulk = Outbox(epoch)
        self.live: set[int] = set()
        self.compiled = True
        self._bound: set[int] = set()
        self._deferred: dict[int, Sample] = {}

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        if epoch != self._outbox.epoch:
            return None
        return self._bulk if line is Line.BULK else self._outbox

    def received(self, message: bytes) -> None:
        self._outbox.send(encode(self._stepped(decode(message))))

    def _stepped(self, frame: Frame) -> Frame:
        for edit in frame.edits:
            if isinstance(edit, Join):
                self.live.add(edit.sequence)
                if edit.sampling.grammar:
                    self._bound.add(edit.sequence)
            elif isinstance(edit, Leave):
                self.live.discard(edit.sequence)
                self._deferred.pop(edit.sequence, None)
        if frame.step and frame.step.tokens[0][-1] == self._fail_at:
            frame = replace(frame, error=Failure(self._index, "STAGE_FAILED", "the step failed"))
        if not self._last:
            return frame
        samples: tuple[Sample, ...] = ()
        if frame.step and frame.step.compute is Compute.DECODE and not frame.error:
            samples = (Sample(frame.step.sequences[0], 0, frame.step.tokens[0][0] + 1),)
        if not self.compiled and frame.step and frame.step.sequences[0] in self._bound:
            self._deferred[frame.step.sequences[0]], samples = samples[0], ()
        if self.compiled:
            samples, self._deferred = (*samples, *self._deferred.values()), {}
        return replace(frame, edits=(), step=None, samples=samples, prompt_logprobs=_score(frame))


def _score(frame: Frame) -> PromptLogprobs | None:
    """Return minus the tokens of the prompt, as if these were their log-probabilities."""
    if frame.step is None or frame.step.scoring is None or frame.error:
        return None
    targets = frame.step.scoring.targets  # each is its own index
    return PromptLogprobs(targets[0], tuple(-float(target) for target in targets))


class Numbers:
    """A decoder that writes each token as a number and a space."""

    def add(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


class Bench:
    """Two fake stages in a memory network, and the loop that drives them. ``skipped_s``: time that passed unseen."""

    def __init__(self, fail_at: int | None = None, guesser: Guesser | None = None) -> None:
        self.skipped_s = 0.0
        self.network = MemoryNetwork()
        self.stages = [FakeStage(0, False), FakeStage(1, True, fail_at)]
        self.network.ports = {"a:1": self.stages[0], "b:1": self.stages[1]}
        self.failures: list[MacpipeError] = []
        specs = [StageSpec(EPOCH, i, 2, MODEL, LayerRange(i, i + 1), 64) for i in range(2)]
        stages = tuple(PlannedStage(s, name, 1, 1) for s, name in zip(specs, ("mac-a", "mac-b"), strict=True))
        self.plan = Plan(EPOCH, MODEL, stages, Route.RELAY, 64, 2, 2, 1)
        room = (1_000_000, 1_000_000)
        self.capacity = Capacity(2, 1, 3, room, (0, 0), lambda tokens: (tokens, tokens))
        self.epoch, self.keep_waiting = EPOCH, False
        self.scheduler = Scheduler(EPOCH, self.capacity, frozenset({0}), guesser)
        self.loop = EngineLoop(self.plan, self.scheduler, Numbers, self.broken, self.clock)
        self.ring_stages = [RingStage("mac-a", "a:1", Route.RELAY), RingStage("mac-b", "b:1", Route.RELAY)]
        self.loop.start(Ring(self.network, EPOCH, self.ring_stages, self.loop.on_message, self.loop.on_stream_lost))

    def clock(self) -> float:
        return time.monotonic() + self.skipped_s

    def broken(self, cause: MacpipeError) -> None:
        """Stand for the coordinator, which looks into the cause before it gives up, or not."""
        self.failures.append(cause)
        if not self.keep_waiting:
            self.loop.refuse(cause)

    def ring_is_whole(self) -> bool:
        return not self.failures

    def replace_ring(self, *, mend: bool = True) -> None:
        """Two fresh stages, one epoch on, behind a network that delivers again or not."""
        self.epoch += 1
        self.stages = [FakeStage(0, False, epoch=self.epoch), FakeStage(1, True, epoch=self.epoch)]
        self.network.ports = {"a:1": self.stages[0], "b:1": self.stages[1]}
        if mend:
            self.network.faults = {}
        plan = replace(self.plan, epoch=self.epoch)
        ring = Ring(self.network, self.epoch, self.ring_stages, self.loop.on_message, self.loop.on_stream_lost)
        self.loop.continue_on(plan, self.capacity, ring)

    async def emptied(self) -> None:
        """Return once the edits that free every sequence have gone round."""
        async with asyncio.timeout(HANG_S):
            while any(s.live for s in self.stages):
                await asyncio.sleep(0.01)

    def ask(
        self,
        name: str,
        first: int = 1,
        max_tokens: int = 3,
        stop: tuple[str, ...] = (),
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  # frozen
    ) -> AnswerQueue:
        answer = AnswerQueue(self.loop.post)
        self.loop.submit(Request(name, (first,), sampling, max_tokens, stop), answer)
        return answer


async def read(answer: AnswerQueue) -> tuple[list[int], str, FinishEvent]:
    tokens, text = [], ""
    async with asyncio.timeout(HANG_S):
        async for event in answer:
            if isinstance(event, TokenEvent):
                tokens.append(event.token)
                text += event.text
            elif isinstance(event, FinishEvent):
                return tokens, text + event.text, event
    raise AssertionError("an answer without an end")


async def collect(answer: AnswerQueue, into: list[AnswerEvent]) -> None:
    async for event in answer:
        into.append(event)


def run(test: Callable[[Bench], object], **options: Any) -> None:
    async def body() -> None:
        bench = Bench(**options)
        try:
            await test(bench)  # type: ignore[misc]
        finally:
            await asyncio.to_thread(bench.loop.stop, NotServing("over"))

    asyncio.run(body())


def test_answers_come_whole_and_in_order() -> None:
    async def body(bench: Bench) -> None:
        answers = [bench.ask(f"r{i}", first=10 * i + 1) for i in range(5)]
        for i, answer in enumerate(answers):
            tokens, text, finish = await read(answer)
            assert tokens == [10 * i + 2, 10 * i + 3, 10 * i + 4]
            assert text == "".join(f"{t} " for t in tokens)
            assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (1, 3)
        await bench.emptied()

    run(body)


def test_a_stop_string_ends_the_answer_and_frees_the_stages() -> None:
    async def body(bench: Bench) -> None:
        tokens, text, finish = await read(bench.ask("a", max_tokens=50, stop=("5 6",)))
        assert text == "2 3 4 "
        assert tokens == [2, 3, 4, 5, 6]
        assert finish.reason == "stop"
        await bench.emptied()

    run(body)


def test_a_client_that_does_not_read_loses_its_answer_and_slows_nobody() -> None:
    async def body(bench: Bench) -> None:
        asleep = bench.ask("asleep", max_tokens=50_000)
        for i in range(20):
            assert (await read(bench.ask(f"awake{i}", first=10 * i)))[2].reason is FinishReason.LENGTH
        await bench.emptied()
        said: list[AnswerEvent] = []
        with pytest.raises(SlowReader, match="reads its tokens too slowly"):
            await asyncio.wait_for(collect(asleep, said), 5)
        assert 1000 < len(said) <= MAX_UNREAD_EVENTS

    run(body)


def test_a_failed_step_ends_one_request_and_names_the_mac() -> None:
    async def body(bench: Bench) -> None:
        bad, good = bench.ask("bad", first=41, max_tokens=9), bench.ask("good", first=1)
        with pytest.raises(StageFailed, match="mac-b: the step failed"):
            await read(bad)
        assert (await read(good))[0] == [2, 3, 4]
        assert not bench.failures

    run(body, fail_at=43)


def test_an_answer_waits_for_its_grammar_alone() -> None:
    async def body(bench: Bench) -> None:
        bench.stages[-1].compiled = False
        waits = bench.ask("waits", first=40, sampling=BOUND)
        for i in range(3):
            assert (await read(bench.ask(f"goes{i}", first=10 * i)))[0] == [10 * i + 1, 10 * i + 2, 10 * i + 3]
        bench.stages[-1].compiled = True
        assert (await read(waits))[0] == [41, 42, 43]
        await bench.emptied()

    run(body)


def test_a_grammar_that_is_late_ends_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "GRAMMAR_WAIT_S", 0.1)

    async def body(bench: Bench) -> None:
        bench.stages[-1].compiled = False
        late = bench.ask("late", sampling=BOUND)
        with pytest.raises(InvalidGrammar, match="the regex was not compiled within") as refusal:
            await read(late)
        assert refusal.value.field == "regex"
        assert (await read(bench.ask("good")))[0] == [2, 3, 4]
        await bench.emptied()
        assert not bench.failures

    run(body)


def test_an_answer_that_waits_for_its_grammar_can_be_ended() -> None:
    async def body(bench: Bench) -> None:
        bench.stages[-1].compiled = False
        waits = bench.ask("waits", sampling=BOUND)
        await read(bench.ask("goes"))
        assert bench.loop.end("waits", Aborted("over")).result(5)
        with pytest.raises(Aborted):
            await read(waits)
        await bench.emptied()

    run(body)


def test_an_answer_that_waits_for_its_grammar_goes_on_with_a_new_ring() -> None:
    async def body(bench: Bench) -> None:
        bench.keep_waiting = True
        bench.stages[-1].compiled = False
        waits = bench.ask("waits", sampling=BOUND)
        await read(bench.ask("goes"))
        bench.network.cut("b:1")
        bench.replace_ring()
        assert (await read(waits))[0] == [2, 3, 4]
        await bench.emptied()

    run(body)


def test_a_cut_stream_ends_every_request_once_and_names_the_mac() -> None:
    async def body(bench: Bench) -> None:
        swallowed = threading.Event()
        bench.network.faults["b:1"] = lambda message: swallowed.set()
        waiting = [bench.ask(f"r{i}") for i in range(4)]
        assert await asyncio.to_thread(swallowed.wait, 10)
        bench.network.cut("b:1")
        for answer in waiting:
            with pytest.raises(WorkerLost, match="mac-b"):
                await read(answer)
        assert len(bench.failures) == 1
        with pytest.raises(WorkerLost, match="mac-b"):
            await read(bench.ask("late"))

    run(body)


def test_a_frame_that_does_not_come_back_breaks_the_ring() -> None:
    """No stream broke and no worker is gone: a stage hangs."""

    async def body(bench: Bench) -> None:
        bench.keep_waiting = True
        bench.loop.deadlines = FrameDeadlines(0.0, floor_s=0.3, most_s=5.0)
        bench.network.faults["b:1"] = lambda message: None if decode(message).number > 6 else message
        answer = bench.ask("a", max_tokens=50)
        async with asyncio.timeout(HANG_S):
            while not bench.failures:
                await asyncio.sleep(0.01)
        assert isinstance(bench.failures[0], FrameOverdue)
        bench.replace_ring()
        assert (await read(answer))[0] == list(range(2, 52))
        assert bench.loop.deadlines.growth == 2.0, "the next ring gets twice the time"

    run(body)


def test_a_frame_that_came_back_unread_is_not_overdue() -> None:
    """A job held the loop up until long after the frame fell due; its reply waits behind that job."""

    async def body(bench: Bench) -> None:
        replied = threading.Event()

        def hold_up() -> bool:
            bench.skipped_s += 3600.0
            return not replied.wait(HANG_S)

        def delay(message: bytes) -> bytes | None:
            frame = decode(message)
            if frame.number != 7 or frame.step:
                return message
            bench.loop.advance_guesses(hold_up)
            bench.loop.on_message(message)
            replied.set()
            return None

        bench.network.faults["b:1"] = delay
        assert (await read(bench.ask("a", max_tokens=50)))[0] == list(range(2, 52))
        assert bench.ring_is_whole()
        assert bench.skipped_s

    run(body)


def test_a_machine_that_slept_gives_frames_their_time_anew() -> None:
    """The reply has reached the machine, but nothing has read it when the loop wakes up first."""

    async def body(bench: Bench) -> None:
        def sleep(message: bytes) -> bytes:
            if decode(message).number == 7:
                bench.skipped_s += 3600.0
                for _ in range(3):
                    bench.loop.view().result(HANG_S)
            return message

        bench.network.faults["b:1"] = sleep
        assert (await read(bench.ask("a", max_tokens=50)))[0] == list(range(2, 52))
        assert bench.ring_is_whole()
        assert bench.skipped_s

    run(body)


def test_a_new_ring_goes_on_where_every_answer_was() -> None:
    async def body(bench: Bench) -> None:
        answers = [bench.ask(f"r{i}", first=10 * i + 1, max_tokens=9) for i in range(4)]
        bench.network.faults["b:1"] = lambda message: None if decode(message).number > 12 else message
        bench.keep_waiting = True
        async with asyncio.timeout(HANG_S):
            while bench.ring_is_whole():
                bench.network.cut("b:1")
                await asyncio.sleep(0.01)
        late = bench.ask("late")
        bench.replace_ring()
        for i, answer in enumerate(answers):
            assert (await read(answer))[0] == list(range(10 * i + 2, 10 * i + 11))
        assert (await read(late))[0] == [2, 3, 4]
        assert len(bench.failures) == 1
        await bench.emptied()

    run(body)


def test_a_ring_that_breaks_before_it_is_taken_up_is_noticed_too() -> None:
    async def body(bench: Bench) -> None:
        bench.keep_waiting = True
        endless = bench.ask("a", max_tokens=10_000)
        bench.loop.on_stream_lost(EPOCH + 1, "mac-b", "it broke while it was opened")
        bench.replace_ring()
        async with asyncio.timeout(HANG_S):
            while not bench.failures:
                await asyncio.sleep(0.01)
        assert "mac-b" in bench.failures[0].sentence
        bench.loop.refuse(bench.failures[0])
        with pytest.raises(WorkerLost, match="opened"):
            await read(endless)

    run(body)


def test_a_request_that_loses_every_ring_ends() -> None:
    async def body(bench: Bench) -> None:
        bench.keep_waiting = True
        bench.network.faults["b:1"] = lambda message: None
        poison = bench.ask("a", max_tokens=10_000)
        for _ in range(MAX_REPLAYS + 1):
            bench.replace_ring(mend=False)
        with pytest.raises(WorkerLost, match="times in a row during this request"):
            await read(poison)

    run(body)


def test_a_lost_frame_is_noticed_by_the_next_one() -> None:
    async def body(bench: Bench) -> None:
        lost: list[bytes] = []

        def lose_one(message: bytes) -> bytes | None:
            if lost:
                return message
            lost.append(message)
            return None

        bench.network.faults["b:1"] = lose_one
        first, second = bench.ask("a"), bench.ask("b")
        for answer in (first, second):
            with pytest.raises(BadFrame, match="was lost"):
                await read(answer)

    run(body)


def test_damage_on_the_wire_ends_requests_with_a_sentence() -> None:
    async def body(bench: Bench) -> None:
        bench.network.faults["b:1"] = lambda message: message if decode(message).step else message[:-1]
        with pytest.raises(BadFrame):
            await read(bench.ask("a"))

    run(body)


def test_an_aborted_request_ends_and_its_lane_is_used_again() -> None:
    async def body(bench: Bench) -> None:
        endless = bench.ask("a", max_tokens=10_000)
        assert await asyncio.wrap_future(bench.loop.end("a", Aborted("enough")))
        with pytest.raises(Aborted, match="enough"):
            await read(endless)
        assert not await asyncio.wrap_future(bench.loop.end("a", Aborted("enough")))
        for i in range(4):
            await read(bench.ask(f"next{i}"))
        await bench.emptied()

    run(body)


def test_a_deadline_is_kept_while_other_work_never_ends() -> None:
    """The inbox is never empty here: each job posts the next one, as a busy ring does."""

    async def body(bench: Bench) -> None:
        def again() -> None:
            if not over:
                bench.loop._inbox.put(again)

        over: list[bool] = []
        bench.loop._inbox.put(again)
        answer = AnswerQueue(bench.loop.post)
        due = time.monotonic() + 0.2
        bench.loop.submit(Request("late", (1,), SamplingParams(), 500_000, deadline=due), answer)
        said: list[AnswerEvent] = []
        try:
            with pytest.raises(DeadlineExceeded, match="deadline of request late"):
                await asyncio.wait_for(collect(answer, said), 20)
        finally:
            over.append(True)

    run(body)


def test_whoever_asks_and_goes_away_disturbs_nobody() -> None:
    async def body(bench: Bench) -> None:
        bench.loop._inbox.put(lambda: time.sleep(0.1))
        gone = [asyncio.wrap_future(f) for f in (bench.loop.view(), bench.loop.end("a", Aborted("enough")))]
        for future in gone:
            future.cancel()
        assert (await read(bench.ask("b")))[0] == [2, 3, 4]
        assert not bench.failures

    run(body)


@pytest.mark.parametrize(("said", "skip"), [(MAX_UNREAD_EVENTS + 1, 0), (3000, 0), (3000, 100)])
def test_an_answer_goes_on_however_much_of_it_was_said_before(said: int, skip: int) -> None:
    async def body(bench: Bench) -> None:
        answer = AnswerQueue(bench.loop.post)
        request = Request("a", (1,), SamplingParams(), said + 3)
        bench.loop.submit(request, answer, (tuple(range(2, said + 2)),), (KnownTokens(skip),))
        events: list[AnswerEvent] = []
        await asyncio.wait_for(collect(answer, events), 10)
        assert [e.token for e in events if isinstance(e, TokenEvent)] == list(range(skip + 2, said + 5))

    run(body)


def test_a_reader_that_is_found_gone_late_does_not_end_the_answer_that_its_client_resumed() -> None:
    """Its call broke, and the client asked again before the broken call was noticed here."""

    async def body(bench: Bench) -> None:
        request = Request("a", (1,), SamplingParams(), 100_000, resumable=True, client="ada")
        broken, resumed = AnswerQueue(bench.loop.post), AnswerQueue(bench.loop.post)
        bench.loop.submit(request, broken)
        assert isinstance(await anext(broken), Accepted)
        assert await asyncio.wrap_future(bench.loop.detach("a", "ada", Aborted("resumed")))
        bench.loop.submit(request, resumed)
        assert not await asyncio.wrap_future(bench.loop.abandon("a", broken))
        for _ in range(20):
            await anext(resumed)
        assert await asyncio.wrap_future(bench.loop.abandon("a", resumed))
        with pytest.raises(Aborted, match="disconnected"):
            await collect(resumed, [])

    run(body)


def test_the_later_of_two_calls_that_resume_a_request_at_once_gets_the_answer() -> None:
    """The first one broke while it waited, say for its model, which is not known here yet."""

    async def body(bench: Bench) -> None:
        request = Request("a", (1,), SamplingParams(), 100_000, resumable=True, client="ada")
        broken, resumed, other = (AnswerQueue(bench.loop.post) for _ in range(3))
        for answer in (broken, resumed):
            bench.loop.submit(request, answer, ((2, 3),), (known(2),))
        with pytest.raises(Aborted, match="resumed by another call"):
            await collect(broken, [])
        bench.loop.submit(replace(request, client="bob"), other, ((2, 3),), (known(2),))
        with pytest.raises(InvalidRequest, match="already live"):
            await collect(other, [])
        assert isinstance(await anext(resumed), Accepted)
        assert [event.token for _ in range(3) if isinstance(event := await anext(resumed), TokenEvent)] == [3, 4, 5]

    run(body)


def test_a_ring_is_lost_with_a_worker_of_its_own_and_not_with_one_of_the_ring_before() -> None:
    """A recovery may be done with a worker before it is believed to be gone."""

    async def body(bench: Bench) -> None:
        bench.keep_waiting = True
        answer = bench.ask("a", max_tokens=500_000)
        assert isinstance(await anext(answer), Accepted)
        bench.loop.suspect(WorkerLost("worker mac-z: silent", worker="mac-z"))
        await asyncio.wrap_future(bench.loop.view())
        assert bench.failures == []
        lost = WorkerLost("worker mac-b: silent", worker="mac-b")
        bench.loop.suspect(lost)
        await asyncio.wrap_future(bench.loop.view())
        assert bench.failures == [lost]

    run(body)


def known(*tokens: int) -> KnownTokens:
    digest = TokenDigest()
    for token in tokens:
        digest.add(token)
    return KnownTokens(len(tokens), digest.digest())


@pytest.mark.parametrize("count", [2, 3, 5], ids=["of the journal", "the last of the journal", "computed again"])
@pytest.mark.parametrize("differs", [False, True])
def test_an_answer_goes_on_only_behind_the_tokens_that_its_reader_has(count: int, differs: bool) -> None:
    async def body(bench: Bench) -> None:
        answer = AnswerQueue(bench.loop.post)
        has = known(*range(2, count + 1), 99 if differs else count + 1)
        bench.loop.submit(Request("a", (1,), SamplingParams(), 6), answer, ((2, 3, 4),), (has,))
        events: list[AnswerEvent] = []
        with pytest.raises(AnswerDiffers, match=f"first {count} tokens") if differs else nullcontext():
            await asyncio.wait_for(collect(answer, events), 10)
        expected = [] if differs else list(range(count + 2, 8))
        assert [e.token for e in events if isinstance(e, TokenEvent)] == expected
        assert (await read(bench.ask("b")))[0] == [2, 3, 4]

    run(body)


def test_an_answer_that_ends_before_its_readers_tokens_is_another() -> None:
    async def body(bench: Bench) -> None:
        answer = AnswerQueue(bench.loop.post)
        bench.loop.submit(Request("a", (1,), SamplingParams(), 4), answer, ((2,),), (known(*range(2, 8)),))
        with pytest.raises(AnswerDiffers, match="has 4 tokens, and the client has 6"):
            await asyncio.wait_for(collect(answer, []), 10)

    run(body)


def test_a_reader_whose_loop_is_closed_is_no_loss_to_the_others() -> None:
    async def another(bench: Bench) -> AnswerQueue:
        return AnswerQueue(bench.loop.post)

    async def body(bench: Bench) -> None:
        orphan = await asyncio.to_thread(lambda: asyncio.run(another(bench)))
        bench.loop.submit(Request("orphan", (1,), SamplingParams(), 3), orphan)
        assert (await read(bench.ask("b")))[0] == [2, 3, 4]
        assert not bench.failures

    run(body)


def test_stopping_ends_what_is_live() -> None:
    async def body(bench: Bench) -> None:
        endless = bench.ask("a", max_tokens=10_000)
        await asyncio.to_thread(bench.loop.stop, NotServing("the coordinator is stopping"))
        with pytest.raises(NotServing, match="stopping"):
            await read(endless)
        assert not bench.failures

    run(body)


def test_samples_end_each_by_itself_and_fail_together() -> None:
    async def body(bench: Bench) -> None:
        answer = AnswerQueue(bench.loop.post, samples=3)
        bench.loop.submit(Request("a", (1,), SamplingParams(), 3, samples=3), answer)
        said: dict[int, list[int]] = {0: [], 1: [], 2: []}
        ends = []
        async with asyncio.timeout(HANG_S):
            async for event in answer:
                if isinstance(event, TokenEvent):
                    said[event.sample].append(event.token)
                elif isinstance(event, FinishEvent):
                    ends.append(event.sample)
        assert said == {i: [2, 3, 4] for i in range(3)}
        assert sorted(ends) == [0, 1, 2]
        endless = AnswerQueue(bench.loop.post, samples=2)
        bench.loop.submit(Request("b", (1,), SamplingParams(), 10_000, samples=2), endless)
        assert await asyncio.wrap_future(bench.loop.end("b#1", Aborted("enough")))
        with pytest.raises(Aborted, match="enough"):
            await read(endless)
        await bench.emptied()

    run(body)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_prompts_log_probabilities_come_once_before_the_tokens_and_after_a_lost_ring(samples: int) -> None:
    prompt = tuple(range(2000))

    async def body(bench: Bench) -> None:
        bench.capacity = replace(bench.capacity, chunk=1, scored_chunk=1)
        bench.replace_ring()
        bench.keep_waiting = True
        answer = AnswerQueue(bench.loop.post, samples=samples)
        asked = Request("a", prompt, SamplingParams(), 2, samples=samples, prompt_logprobs=0)
        bench.loop.submit(asked, answer)
        pieces: list[PromptLogprobs] = []
        tokens = 0
        async with asyncio.timeout(HANG_S):
            async for event in answer:
                if isinstance(event, PromptLogprobs):
                    assert not tokens
                    pieces.append(event)
                    if len(pieces) == 20:
                        bench.capacity = replace(bench.capacity, chunk=64, scored_chunk=50)
                        bench.replace_ring()
                elif isinstance(event, TokenEvent):
                    tokens += 1
        assert [value for piece in pieces for value in piece.logprobs] == [-float(i) for i in prompt[1:]]
        assert [piece.start for piece in pieces[:20]] == list(range(1, 21))
        assert max(len(piece.logprobs) for piece in pieces) == 50
        assert tokens == 2 * samples

    run(body)


class Counting:
    """Guesses that the next token is one more; every third time that it is two more."""

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        self.calls += 1
        return Guess((tokens[-1] + 1 + (self.calls % 3 == 0),), GuessSource.REPLAY)

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None: ...

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None: ...

    def observe(self, request: Request, tokens: Sequence[int]) -> None: ...

    def forget(self, request: Request) -> None: ...

    def forget_client(self, client: str) -> None: ...


def test_only_verified_tokens_are_sent_and_journalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are in flight as answers end by length, by a stop string and by an abort, and as a ring is lost."""
    written: list[tuple[str, int]] = []

    class Recording(Journal):
        def record_token(self, request_id: str, token: int, sample: int) -> None:
            written.append((request_id, token))
            super().record_token(request_id, token, sample)

    monkeypatch.setattr(LapMeter, "times", LapTimes((1.0, 1.0)))
    monkeypatch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: most)

    async def body(bench: Bench) -> None:
        bench.loop.answers.journal = Recording(tmp_path / "j")
        assert (await read(bench.ask("length", max_tokens=20)))[0] == list(range(2, 22))
        assert (await read(bench.ask("stop", max_tokens=50, stop=("9 10",))))[0] == list(range(2, 11))
        await bench.emptied()
        ended = bench.ask("aborted", max_tokens=50_000)
        assert isinstance(await anext(ended), Accepted)
        assert await asyncio.wrap_future(bench.loop.end("aborted", Aborted("enough")))
        with pytest.raises(Aborted):
            await read(ended)
        await bench.emptied()
        bench.keep_waiting = True
        lost = bench.ask("lost", max_tokens=3000)
        bench.replace_ring()
        assert (await read(lost))[0] == list(range(2, 3002))
        await bench.emptied()
        counts = bench.scheduler.speculation.counts.of(GuessSource.REPLAY)
        assert min(counts.accepted, counts.voided) > 500

    run(body, guesser=Counting())
    for name, count in (("length", 20), ("stop", 9), ("lost", 3000)):
        assert [token for request, token in written if request == name] == list(range(2, 2 + count))
    aborted = [token for request, token in written if request == "aborted"]
    assert aborted == list(range(2, 2 + len(aborted)))


def test_a_full_disk_under_the_journal_leaves_no_answer_without_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def body(bench: Bench) -> None:
        bench.loop.answers.journal = journal = Journal(tmp_path / "j")
        assert (await read(bench.ask("before")))[0] == [2, 3, 4]
        monkeypatch.setattr(private_files.os, "write", full)
        for i in range(3):
            assert (await read(bench.ask(f"full{i}")))[0] == [2, 3, 4]
        ended = bench.ask("aborted", max_tokens=50_000)
        assert await asyncio.wrap_future(bench.loop.end("aborted", Aborted("enough")))
        with pytest.raises(Aborted):
            await read(ended)
        assert "No space left" in journal.problem
        monkeypatch.undo()
        assert (await read(bench.ask("after")))[0] == [2, 3, 4]
        assert not bench.failures

    run(body)


def test_live_requests_are_counted_until_they_end() -> None:
    """A coordinator with live requests keeps its Mac awake."""

    async def body() -> None:
        generation = Generation(Request("a", (1,), SamplingParams(), 3), Numbers)
        assert len(generation._live) == 0
        list(generation.begin())
        generation.say(5)
        assert len(generation._live) == 1
        generation.end()
        assert len(generation._live) == 0

    asyncio.run(body())
