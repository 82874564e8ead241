"""Chains of guesses: whoever guesses, tokens and what stages hold are those without; nobody waits for a guess."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, Join, Save, StageTiming, Trim
from cluster.core.request import Grammar, GrammarKind, Request, SamplingParams
from cluster.scheduler import guess_chains
from cluster.scheduler.guessing import GuessSource
from cluster.scheduler.outcome import Produced
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.verify_length import Depth
from effort import effort
from scheduler.guessers import Constant, Fickle, Oracle
from scheduler.stages import Stages, capacity, continuation
from scheduler.test_ring import play

GUESSERS: dict[str, Callable[[random.Random], Oracle]] = {
    "oracle": lambda rng: Oracle(rng, 0.0),
    "erring": lambda rng: Oracle(rng, 0.4),
    "adversarial": lambda rng: Oracle(rng, 1.0),
    "constant": lambda rng: Constant(rng, 0.0),
    "fickle": lambda rng: Fickle(rng, 0.5),
}


ROWS = {2: 1.0, 3: 1.1, 6: 1.5}
"""The costs of cheap rows. Four of them were not measured, so no frame has four."""


def any_depth(rng: random.Random, steps: Collection[int], stages: int) -> Depth:
    return Depth(rng.randint(1, stages), rng.choice(sorted(steps)))


def request(name: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 20, **more: object) -> Request:
    return Request(name, prompt, SamplingParams(), max_tokens, **more)  # type: ignore[arg-type]


@settings(max_examples=effort(25, 300, 8), deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.sampled_from(sorted(GUESSERS)),
    st.sampled_from(["rows", "trimmable", "marks"]),
    st.booleans(),
)
def test_whoever_guesses_tokens_and_prefixes_are_those_without(
    seed: int, stages: int, guesser: str, caches: str, fails: bool
) -> None:
    """Failures, aborts, shared beginnings, kept prefixes; stages skip what is void, or compute it."""
    rng = random.Random(seed)
    guessing = GUESSERS[guesser](rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: rng.randint(1, max(1, most)))
        patch.setattr(guess_chains, "choose_depth", lambda steps, *_: any_depth(rng, steps, stages))
        row = play(
            rng,
            0.02 * fails,
            caches != "marks",
            rng.choice((1, 1, 2)),
            count=stages,
            guesser=guessing,
            steps=effort(1200, 3000),
            verify_costs=ROWS if caches == "rows" else None,
        )
    histories = [(*request.prompt, *row.said[request.id]) for request in row.asked.values()]
    for stage in row.stages:
        assert not stage.fed
        assert stage.prefixes.keys() == row.stages[0].prefixes.keys()
        for tokens, _ in stage.prefixes.values():
            assert any(history[: len(tokens)] == tokens for history in histories)
    for counts in row.scheduler.speculation.counts.by_source.values():
        assert counts.guessed == counts.accepted + counts.voided
        assert counts.rows == 0 or caches == "rows"
    row.scheduler.guess_frames(row.now)
    assert sorted(guessing.left) == sorted(row.asked)
    assert all(guessing.seen[name] == (*row.asked[name].prompt, *row.said[name]) for name in guessing.seen)


class Ring:
    """One user's ring whose frames come back one at a time, 10 ms apart."""

    def __init__(self, guesser: Oracle | None, stages: int = 2, **options: object) -> None:
        self.plan = capacity(lanes=stages, stages=stages, budget=10_000, **options)  # type: ignore[arg-type]
        self.scheduler, self.stages = Scheduler(1, self.plan, frozenset({0}), guesser), Stages()
        self.now, self.said = 0.0, dict[str, list[int]]()
        self.events: list[Produced] = []

    def write(self) -> list[Frame]:
        frames = self.scheduler.next_frames(self.now)
        frames += self.scheduler.guess_frames(self.now)
        self.stages.take(frames)
        return frames

    def turn(self) -> list[Frame]:
        """Take one frame back. Return those that were written then."""
        self.now += 0.01
        timings = tuple(StageTiming(i, 0, 1000, 0) for i in range(len(self.plan.budget)))
        for event in self.scheduler.on_frame(replace(self.stages.give(), timings=timings), self.now).events:
            assert isinstance(event, Produced)
            self.events.append(event)
            self.said.setdefault(event.request_id, []).append(event.sample.token)
        return self.write()

    def warm_up(self) -> None:
        """Answer a request, from which laps are measured and acceptance is learnt."""
        self.scheduler.submit(request("warm"))
        self.write()
        while self.stages.frames:
            self.turn()

    def finish(self) -> None:
        while self.stages.frames:
            self.turn()
        assert not self.stages.fed


def guesses(frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame.step and frame.step.guesses]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_chain_has_as_many_frames_as_stages_behind_a_certain_head(stages: int, rng: random.Random) -> None:
    ring = Ring(Oracle(rng, 0.0), stages)
    ring.warm_up()
    ring.scheduler.submit(request("a"))
    ring.write()
    longest = 0
    while ring.stages.frames:
        ring.turn()
        steps = [frame.step for frame in ring.stages.frames if frame.step]
        longest = max(longest, len(steps))
        starts = [step.start for step in steps if step.start is not None]
        assert all(after == before + 1 for before, after in pairwise(starts))
    assert longest == stages
    assert ring.said["a"] == continuation((1, 2, 3), 20)
    assert sum(event.guess is GuessSource.NGRAM or event.guess is GuessSource.REPLAY for event in ring.events) > 25


def test_a_miss_is_a_trim_on_the_next_frame(rng: random.Random) -> None:
    ring = Ring(Oracle(rng, 0.0), 2)
    ring.warm_up()
    ring.scheduler.submit(request("a"))
    ring.write()
    while not guesses(list(ring.stages.frames)):
        ring.turn()
    ring.scheduler.speculation._guesser.error = 1.0  # type: ignore[union-attr]
    while True:
        frames = ring.turn()
        if trims := [(frame, edit) for frame in frames for edit in frame.edits if isinstance(edit, Trim)]:
            break
    ((frame, trim),) = trims
    assert frame.step
    assert (frame.step.start, frame.step.guesses) == (trim.length, 0)
    ring.finish()
    assert ring.said["a"] == continuation((1, 2, 3), 20)
    assert any(event.missed for event in ring.events)


def test_a_right_guess_that_a_stage_skipped_is_fed_again(rng: random.Random) -> None:
    ring = Ring(Oracle(rng, 0.0), 2)
    ring.warm_up()
    ring.scheduler.submit(request("a"))
    ring.write()
    skipped = 0
    while ring.stages.frames:
        if skipped < 3 and (head := next(iter(ring.stages.frames))).step and head.step.guesses:
            skipped += 1
            waiting = ring.stages.frames._waiting[0]
            waiting.frame = replace(waiting.frame, void=True)
        ring.turn()
    assert skipped == 3
    assert ring.said["a"] == continuation((1, 2, 3), 20)


def test_there_is_no_guess_while_a_prompt_is_read_or_lanes_fill_the_stages(rng: random.Random) -> None:
    ring = Ring(Oracle(rng, 0.0), 2, chunk=4)
    ring.warm_up()
    ring.scheduler.submit(request("a", max_tokens=200))
    ring.write()
    while not guesses(list(ring.stages.frames)):
        ring.turn()
    ring.scheduler.submit(request("b", tuple(range(10, 60)), max_tokens=30))
    while "b" not in ring.said or len(ring.said["b"]) < 29:
        assert not guesses(ring.turn())
    while not guesses(ring.turn()):
        pass
    ring.finish()
    assert ring.said["a"] == continuation((1, 2, 3), 200)


def test_a_second_row_of_a_lane_waits_for_no_guess(rng: random.Random) -> None:
    """Two requests share the only lane of three stages."""
    plan = capacity(lanes=1, stages=3)
    ring = Ring(Oracle(rng, 0.0), 3)
    ring.scheduler = Scheduler(1, plan, frozenset(), Oracle(rng, 0.0))
    ring.stages = Stages()
    ring.warm_up()
    ring.scheduler.submit(request("a", max_tokens=60))
    ring.write()
    while len(guesses(list(ring.stages.frames))) < 2:
        ring.turn()
    ring.scheduler.submit(request("b", (5,), max_tokens=20))
    ring.write()
    for _ in range(2):  # the frame that was certain then, and one that may have been verified meanwhile
        ring.turn()
    assert any(frame.step and len(frame.step.sequences) == 2 for frame in ring.stages.frames)
    ring.finish()
    assert (ring.said["a"], ring.said["b"]) == (continuation((1, 2, 3), 60), continuation((5,), 20))


def test_an_abort_in_mid_chain_keeps_the_verified_prefix_alone(rng: random.Random) -> None:
    ring = Ring(Oracle(rng, 1.0), 2, prefixes=5_000)
    prompt = tuple(range(1, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: most)
        ring.warm_up()
        ring.scheduler.submit(request("a", prompt))
        ring.write()
        while len(ring.said.get("a", ())) < 5:
            ring.turn()
        assert guesses(list(ring.stages.frames))
        ring.scheduler.end("a")
        ring.write()
        edits = [edit for frame in ring.stages.frames for edit in frame.edits]
        assert not any(isinstance(edit, Save) for edit in edits)
        ring.finish()
    kept = max(ring.stages.prefixes.values(), key=len)
    assert kept == (*prompt, *continuation(prompt, 5))[: len(kept)]


def test_nothing_is_guessed_past_max_tokens_nor_for_who_wants_none(rng: random.Random) -> None:
    ring = Ring(Oracle(rng, 0.0), 4)
    ring.warm_up()
    ring.scheduler.submit(
        request("a", max_tokens=9),
    )
    ring.scheduler.submit(request("b", (4, 5), max_tokens=9, speculate=False))
    ring.write()
    ring.finish()
    ring.scheduler.submit(request("c", max_tokens=9, speculate=False))
    assert not guesses(ring.write())
    while ring.stages.frames:
        assert not guesses(ring.turn())
    for name, prompt in (("a", (1, 2, 3)), ("b", (4, 5)), ("c", (1, 2, 3))):
        assert ring.said[name] == continuation(prompt, 9)


def test_wrong_guesses_are_soon_not_sent_but_still_compared(rng: random.Random) -> None:
    oracle = Oracle(rng, 1.0)
    ring = Ring(oracle, 2)
    ring.scheduler.submit(request("a", max_tokens=300))
    ring.write()
    while len(ring.said.get("a", ())) < 150:
        ring.turn()
    sent = sum(counts.guessed for counts in ring.scheduler.speculation.counts.by_source.values())
    assert sent < 60
    oracle.error = 0.0
    for _ in range(80):
        ring.turn()
    assert sum(c.accepted for c in ring.scheduler.speculation.counts.by_source.values()) > 10
    ring.finish()
    assert ring.said["a"] == continuation((1, 2, 3), 300)


def test_only_a_guess_may_be_void(rng: random.Random) -> None:
    ring = Ring(None)
    ring.scheduler.submit(request("a", (1,)))
    ring.write()
    with pytest.raises(BadFrame, match="it is void, but it was no guess"):
        ring.scheduler.on_frame(replace(ring.stages.give(), void=True, samples=()))


def test_a_model_whose_caches_need_marks_is_guessed_only_where_they_fit(rng: random.Random) -> None:
    for budget, fits in ((1000, True), (27, False)):
        plan = capacity(lanes=2, stages=2, budget=budget, trimmable=False)
        ring = Ring(Oracle(rng, 0.0), 2)
        ring.scheduler, ring.stages = Scheduler(1, plan, frozenset(), Oracle(rng, 0.0)), Stages(trimmable=False)
        ring.warm_up()
        assert bool(ring.scheduler.speculation.counts.by_source) is fits
        assert bool(ring.scheduler.speculation.counts.without_room) is not fits
        assert ring.scheduler.reserved == (0, 0)
        assert [f.step.compute for f in ring.stages.frames if f.step] == list[Compute]()


def test_what_a_grammar_forces_is_told_to_the_guesser(rng: random.Random) -> None:
    hints: list[tuple[int, tuple[int, ...]]] = []

    class Hinted(Oracle):
        def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
            hints.append((position, tokens))

    ring = Ring(Hinted(rng, 0.0))
    grammar = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a"))
    ring.scheduler.submit(replace(request("a", (1,)), sampling=grammar), replace(request("b", (1,)), speculate=False))
    frames = ring.write()
    assert [e.look_ahead for f in frames for e in f.edits if isinstance(e, Join)] == [True, False]
    ring.stages.compiling.clear()
    reply = ring.stages.give()
    forced = tuple(replace(sample, forced=(4, 5)) for sample in reply.samples)
    ring.scheduler.on_frame(replace(reply, samples=forced))
    assert hints == [(sample.position + 1, (4, 5)) for sample in forced]
