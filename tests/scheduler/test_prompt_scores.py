"""A request gets the log-probability of each token of its prompt once, in order and before its first token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Failure, Frame, Restore
from cluster.core.request import FinishReason, PromptLogprobs, Request, SamplingParams
from cluster.scheduler.outcome import Produced, PromptScored
from cluster.scheduler.scheduler import Scheduler
from effort import effort
from scheduler.stages import EOS, Stages, capacity, continuation, logprob

PROMPT = tuple(i * 7 % 23 + 1 for i in range(30))


def request(name: str = "a", prompt: tuple[int, ...] = PROMPT, max_tokens: int = 3, top: int | None = 2) -> Request:
    return Request(name, prompt, SamplingParams(), max_tokens, prompt_logprobs=top)


def expected(prompt: tuple[int, ...]) -> list[float]:
    return [logprob(prompt[:i], prompt[i]) for i in range(1, len(prompt))]


class Reader:
    """What the reader of each request has got so far."""

    def __init__(self) -> None:
        self.logprobs: dict[str, list[float]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}

    def take(self, events: tuple[object, ...]) -> None:
        for event in events:
            if isinstance(event, PromptScored):
                found = self.logprobs.setdefault(event.request_id, [])
                assert event.logprobs.start == 1 + len(found), "a piece is missing or comes twice"
                assert event.request_id not in self.tokens
                found += event.logprobs.logprobs
            elif isinstance(event, Produced):
                self.tokens.setdefault(event.request_id, [])
                if event.counts:
                    self.tokens[event.request_id].append(event.sample.token)
                if event.finish:
                    self.finished[event.request_id] = event.finish


def run_dry(scheduler: Scheduler, stages: Stages, reader: Reader) -> None:
    stages.take(scheduler.next_frames(0.0))
    while stages.frames:
        reader.take(scheduler.on_frame(stages.give()).events)
        stages.take(scheduler.next_frames(0.0))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_every_token_but_the_first_is_reported_before_the_answer(chunk: int) -> None:
    scheduler, stages, reader = Scheduler(1, capacity(chunk=chunk), frozenset()), Stages(), Reader()
    scheduler.submit(request())
    run_dry(scheduler, stages, reader)
    assert reader.logprobs["a"] == expected(PROMPT)
    assert reader.tokens["a"] == continuation(PROMPT, 3)


@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_may_be_as_short_as_a_token(length: int) -> None:
    scheduler, stages, reader = Scheduler(1, capacity(), frozenset()), Stages(), Reader()
    scheduler.submit(request(prompt=PROMPT[:length]))
    run_dry(scheduler, stages, reader)
    assert reader.logprobs.get("a", []) == expected(PROMPT[:length])
    assert reader.tokens["a"] == continuation(PROMPT[:length], 3)


@pytest.mark.parametrize("length", [1, 2, 30])
def test_without_an_answer_it_ends_after_its_prompt(length: int) -> None:
    scheduler, stages, reader = Scheduler(1, capacity(), frozenset({EOS})), Stages(), Reader()
    scheduler.submit(request(prompt=PROMPT[:length], max_tokens=0))
    run_dry(scheduler, stages, reader)
    assert reader.logprobs.get("a", []) == expected(PROMPT[:length])
    assert (reader.tokens["a"], reader.finished["a"]) == ([], FinishReason.LENGTH)
    assert scheduler.sequences == ()


def test_a_chunk_that_is_reported_fits_its_own_bound_and_other_samples_wait_for_it() -> None:
    scheduler, stages, reader = Scheduler(1, capacity(chunk=8, scored_chunk=3), frozenset()), Stages(), Reader()
    scheduler.submit(request(), request("b", top=None))
    frames = scheduler.next_frames(0.0)
    assert max(len(f.step.tokens[0]) for f in frames if f.step) == 3
    stages.take(frames)
    run_dry(scheduler, stages, reader)
    assert (reader.logprobs["a"], reader.logprobs.get("b")) == (expected(PROMPT), None)
    assert reader.tokens["b"] == continuation(PROMPT, 3)


def test_a_kept_prefix_serves_only_those_that_want_no_report_of_it() -> None:
    scheduler, stages, reader = Scheduler(1, capacity(prefixes=5000), frozenset()), Stages(), Reader()
    scheduler.submit(request("first", top=None))
    run_dry(scheduler, stages, reader)
    scheduler.submit(request("reported"))
    frames = scheduler.next_frames(0.0)
    assert not any(isinstance(edit, Restore) for f in frames for edit in f.edits)
    stages.take(frames)
    run_dry(scheduler, stages, reader)
    assert reader.logprobs == {"reported": expected(PROMPT)}
    scheduler.submit(request("last", top=None))
    assert any(isinstance(edit, Restore) for f in scheduler.next_frames(0.0) for edit in f.edits)


@pytest.mark.parametrize("seed", range(effort(30, 300)))
def test_recoveries_and_failures_repeat_and_lose_nothing(seed: int) -> None:
    """Rings are lost in mid-prompt; chunks differ from epoch to epoch; others share the prompt and its prefixes."""
    rng = random.Random(seed)
    epoch, reader = 1, Reader()
    scheduler, stages = Scheduler(epoch, capacity(lanes=2, prefixes=5000), frozenset()), Stages()
    asked = []
    for i in range(6):
        one = request(f"r{i}", PROMPT[: rng.randint(1, 30)], rng.randint(0, 4), rng.choice([None, 0, 2]))
        asked.append(one if one.max_tokens else replace(one, prompt_logprobs=1))
    waiting = list(asked)
    failed: set[str] = set()
    while waiting or stages.frames or scheduler.sequences:
        if waiting and rng.random() < 0.3:
            scheduler.submit(waiting.pop())
        stages.take(scheduler.next_frames(0.0))
        if stages.frames:
            failure = Failure(1, "STAGE_FAILED", "no") if rng.random() < 0.02 else None
            events = scheduler.on_frame(stages.give(failure)).events
            failed |= {e.request_id for e in events} if failure else set()
            reader.take(() if failure else events)
        if rng.random() < 0.05 and epoch < 12:
            epoch += 1
            limits = capacity(lanes=2, prefixes=5000, chunk=rng.randint(1, 9), scored_chunk=rng.randint(1, 9))
            scheduler.begin_epoch(epoch, limits)
            stages = Stages()
    for r in asked:
        want = expected(r.prompt) if r.prompt_logprobs is not None else []
        found, said = reader.logprobs.get(r.id, []), reader.tokens.get(r.id, [])
        if r.id in failed:
            assert found == want[: len(found)]
        else:
            assert (found, said) == (want, continuation(r.prompt, r.max_tokens))


GOOD = PromptLogprobs(1, (-1.0, -2.0, -3.0, -4.0), (7,) * 8, (-1.0,) * 8)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "0 log-probabilities of its prompt"),
        (replace(GOOD, logprobs=(-1.0,) * 3), "3 log-probabilities of its prompt"),
        (replace(GOOD, start=2), "it should begin at 1"),
    ],
)
def test_a_stage_that_reports_something_else_is_found_out(answer: PromptLogprobs | None, words: str) -> None:
    scheduler = Scheduler(1, capacity(), frozenset())
    scheduler.submit(request())
    first = scheduler.next_frames(0.0)[0]
    with pytest.raises(BadFrame, match=words):
        scheduler.on_frame(Frame(1, first.lane, first.number, prompt_logprobs=answer))


def test_a_report_that_nobody_asked_for_is_refused() -> None:
    scheduler = Scheduler(1, capacity(), frozenset())
    scheduler.submit(request(top=None))
    first = scheduler.next_frames(0.0)[0]
    with pytest.raises(BadFrame, match="4 log-probabilities of its prompt"):
        scheduler.on_frame(Frame(1, first.lane, first.number, prompt_logprobs=GOOD))


def test_a_report_for_a_request_that_has_ended_is_dropped() -> None:
    scheduler, stages, reader = Scheduler(1, capacity(), frozenset()), Stages(), Reader()
    scheduler.submit(request())
    stages.take(scheduler.next_frames(0.0))
    scheduler.end("a")
    run_dry(scheduler, stages, reader)
    assert (reader.logprobs, reader.tokens) == ({}, {})
