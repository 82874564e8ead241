"""Rows of guesses: frames of several tokens where that pays, verified up to the first wrong guess, for one user."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame, Sample, Save, SequenceFailure, StageTiming, Step, Trim
from cluster.core.lap_times import LapTimes, mean_token_time
from cluster.core.request import Request
from cluster.scheduler import guess_chains
from cluster.scheduler.guess_window import LapMeter
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.outcome import Produced, SampleFailed
from cluster.scheduler.verify_length import Depth, choose_depth
from effort import effort
from scheduler.guessers import Oracle
from scheduler.stages import continuation, next_token
from scheduler.test_guess_chains import ROWS, Ring, request
from scheduler.test_speculation import HOP_MS, Known, TimedRing, _token

PROMPT = (1, 2, 3)


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of three tokens, as many as there may be in flight."""
    monkeypatch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: most)
    monkeypatch.setattr(
        guess_chains, "choose_depth", lambda steps, _, most: Depth(most, max(n for n in steps if n < 4))
    )


class Eager(Oracle):
    """Guesses as many tokens as are asked for."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        found = list(tokens)
        for _ in range(count):
            token = next_token(tuple(found))
            found.append(token % 50 + 1 if self.rng.random() < self.error else token)
        return Guess(tuple(found[len(tokens) :]), GuessSource.REPLAY)


def guessing(rng: random.Random, error: float = 0.0, stages: int = 2, **options: object) -> Ring:
    """A ring that has answered a request, so that its laps are known."""
    ring = Ring(Eager(rng, error), stages, verify_costs=ROWS, **options)
    ring.warm_up()
    return ring


def steps(ring: Ring) -> list[Step]:
    return [frame.step for frame in ring.stages.frames if frame.step]


def until_row(ring: Ring) -> None:
    """Go on until a row of three tokens begins a chain."""
    while not (ring.stages.frames and any(len(step.tokens[0]) == 3 and not step.guessed for step in steps(ring))):
        ring.turn()


def test_a_chain_begins_with_a_certain_token_and_has_rows_of_guesses_behind_it(deep: None, rng: random.Random) -> None:
    ring = guessing(rng, stages=3)
    ring.scheduler.submit(request("a", PROMPT, 60))
    ring.write()
    lengths = set[tuple[int, ...]]()
    while ring.stages.frames:
        ring.turn()
        every = steps(ring)
        lengths.add(tuple(len(step.tokens[0]) for step in every))
        for before, after in pairwise(every):
            assert before.start is not None
            assert after.start == before.start + len(before.tokens[0])
            assert after.guessed
    assert max(lengths) == (3, 3, 3)
    assert ring.said["a"] == continuation(PROMPT, 60)
    counts = ring.scheduler.speculation.counts.by_source.values()
    assert 20 < sum(count.rows for count in counts) < sum(count.accepted for count in counts)


def test_a_miss_within_a_row_is_a_trim_to_it(deep: None, rng: random.Random) -> None:
    ring = guessing(rng, 0.5)
    ring.scheduler.submit(request("a", PROMPT, 120))
    ring.write()
    within = 0
    while ring.stages.frames:
        rows = {step.start: len(step.tokens[0]) for step in steps(ring)}
        for frame in ring.turn():
            for trim in (edit for edit in frame.edits if isinstance(edit, Trim)):
                assert frame.step
                assert frame.step.start == trim.length
                within += any(start < trim.length < start + length for start, length in rows.items() if start)
    assert within > 5
    assert ring.said["a"] == continuation(PROMPT, 120)
    assert not ring.stages.fed


def test_an_abort_keeps_no_guess_of_a_row_in_flight(deep: None, rng: random.Random) -> None:
    ring = guessing(rng, 1.0, prefixes=5_000)
    prompt = tuple(range(1, 20))
    ring.scheduler.submit(request("a", prompt, 30))
    ring.write()
    until_row(ring)
    ring.scheduler.end("a")
    (trim,) = [edit for frame in ring.write() for edit in frame.edits if isinstance(edit, Trim)]
    assert trim.length == len(prompt) + len(ring.said["a"])
    assert not any(isinstance(edit, Save) for frame in ring.stages.frames for edit in frame.edits)
    ring.finish()
    kept = [tokens for tokens in ring.stages.prefixes.values() if tokens[:19] == prompt]
    assert kept == [(*prompt, *continuation(prompt, len(ring.said["a"])))]
    counts = ring.scheduler.speculation.counts.by_source.values()
    assert all(count.guessed == count.accepted + count.voided for count in counts)


def test_another_user_ends_rows_at_once(deep: None, rng: random.Random) -> None:
    ring = guessing(rng, stages=4)
    ring.scheduler.submit(request("a", PROMPT, 200))
    ring.write()
    until_row(ring)
    ring.scheduler.submit(request("b", (4, 5, 6, 7), 30))
    while len(ring.said.get("b", ())) < 29:
        frames = ring.turn() if "b" in ring.said else ring.write() + ring.turn()
        assert all(len(frame.step.tokens[0]) == 1 for frame in frames if frame.step and frame.step.sampled)
    ring.finish()
    assert (ring.said["a"], ring.said["b"]) == (continuation(PROMPT, 200), continuation((4, 5, 6, 7), 30))


def test_nothing_is_guessed_past_max_tokens(deep: None, rng: random.Random) -> None:
    for tokens in range(1, 12):
        ring = guessing(rng, stages=3)
        ring.scheduler.submit(request("a", PROMPT, tokens))
        ring.write()
        while ring.stages.frames:
            assert all(step.start is None or step.start + len(step.tokens[0]) < 3 + tokens for step in steps(ring))
            ring.turn()
        assert ring.said["a"] == continuation(PROMPT, tokens)


@pytest.mark.parametrize(
    ("samples", "failed"),
    [
        ([], False),
        ([0], False),
        ([0, 1], False),
        ([9, 1], False),
        ([0, 9, 2], False),
        ([9], True),
        ([0, 1, 2, 3], False),
        ([0, 1, 2], True),
    ],
)
def test_a_row_is_answered_up_to_its_first_wrong_guess(
    samples: list[int], failed: bool, deep: None, rng: random.Random
) -> None:
    """Samples of a row of right guesses 0 and 1: too few, behind a miss, too many, a failure behind a miss."""
    ring, reply = row_reply(rng)
    right = [sample.token for sample in reply.samples]
    said = [Sample(reply.samples[0].sequence, 4 + i, right[n] if n < 3 else 77) for i, n in enumerate(samples)]
    failures = (SequenceFailure(reply.samples[0].sequence, "STAGE_FAILED", "no"),) if failed else ()
    with pytest.raises(BadFrame, match=r"samples of a row of 3 tokens|too many answers"):
        ring.scheduler.on_frame(replace(reply, samples=tuple(said), failures=failures))


def row_reply(rng: random.Random) -> tuple[Ring, Frame]:
    """A ring, and the reply to a row of a certain token and two right guesses."""
    ring = guessing(rng)
    ring.scheduler.submit(request("a", PROMPT, 30))
    ring.write()
    until_row(ring)
    reply = ring.stages.give()
    assert len(reply.samples) == 3
    return ring, reply


def test_a_row_that_fails_gives_the_tokens_before(deep: None, rng: random.Random) -> None:
    ring, reply = row_reply(rng)
    failure = SequenceFailure(reply.samples[0].sequence, "STAGE_FAILED", "no")
    events = ring.scheduler.on_frame(replace(reply, samples=reply.samples[:1], failures=(failure,))).events
    token, failed = events
    assert isinstance(token, Produced)
    assert token.sample == reply.samples[0]
    assert isinstance(failed, SampleFailed)
    ring.write()
    while ring.stages.frames:
        ring.scheduler.on_frame(ring.stages.give())
        ring.write()
    assert ring.scheduler.sequences == ()


def test_wrong_rows_waste_their_share_of_a_frame(deep: None, rng: random.Random) -> None:
    ring, reply = row_reply(rng)
    before = list(ring.scheduler.speculation.counts.wasted_s) or [0.0, 0.0]
    wrong = replace(reply.samples[0], token=77)
    timings = (StageTiming(0, 0, 3000, 0), StageTiming(1, 0, 6000, 0))
    ring.scheduler.on_frame(replace(reply, samples=(wrong,), timings=timings))
    wasted = [after - b for after, b in zip(ring.scheduler.speculation.counts.wasted_s, before, strict=True)]
    assert wasted == [pytest.approx(0.002), pytest.approx(0.004)]


def test_expected_times_give_way_to_measured_ones() -> None:
    meter = LapMeter(2, {3: (1.1, 1.2)})
    for _ in range(4):
        meter.learn((StageTiming(0, 0, 10_000, 0), StageTiming(1, 0, 20_000, 0)), 0.036)
    assert meter.steps() == {
        1: LapTimes((pytest.approx(0.01), pytest.approx(0.02)), pytest.approx(0.002)),
        3: LapTimes((pytest.approx(0.011), pytest.approx(0.024)), pytest.approx(0.002)),
    }
    assert choose_depth(meter.steps(), 0.8, 2) == Depth(2, 3)
    for _ in range(4):
        meter.learn((StageTiming(0, 0, 30_000, 0), StageTiming(1, 0, 60_000, 0)), None, 3)
    assert meter.steps()[3].stages == (pytest.approx(0.03), pytest.approx(0.06))
    assert choose_depth(meter.steps(), 0.8, 2) == Depth(2, 1)


CHEAP = {2: 1.05, 3: 1.11, 4: 1.28, 5: 1.45, 8: 2.2}
"""As recorded of a 70B with 4-bit weights on an M5 Max; two and four tokens are in between."""
DEAR = {2: 1.97, 3: 2.93, 4: 3.86, 8: 7.7}
"""As measured on a CPU."""


class KnownAhead(Known):
    """Guesses as many tokens as are asked for, each of them right with a probability."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        at = range(len(tokens), len(tokens) + count)
        right = (self.rng.random() < self.acceptance for _ in at)
        truth = zip(at, right, strict=True)
        return Guess(tuple(_token(request.prompt, i) if good else 1_000 for i, good in truth), GuessSource.REPLAY)


def play(stages: tuple[float, ...], guesser: Known | None, costs: dict[int, float]) -> tuple[float, int]:
    """Return one user's mean time per token, after the scheduler has learnt what guesses are worth, and its rows."""
    tokens = effort(600, 4000)
    ring = TimedRing(stages, guesser, costs=costs)
    ring.ask("warm", 3, 2, 200)
    ring.run()
    ring.ask("a", 4, 2, tokens)
    ring.run()
    arrivals = ring.arrivals["a"]
    assert len(arrivals) == tokens
    rows = sum(count.rows for count in ring.scheduler.speculation.counts.by_source.values())
    return (arrivals[-1] - arrivals[0]) / (tokens - 1), rows


@pytest.mark.parametrize("stages", [(20.0,), (10.0, 10.0), (5.0, 15.0), (7.0, 7.0, 7.0), (5.0,) * 4], ids=str)
@pytest.mark.parametrize("acceptance", [0.7, 0.9])
def test_cheap_rows_are_as_fast_as_the_formula_says(
    stages: tuple[float, ...], acceptance: float, rng: random.Random
) -> None:
    every = {n: LapTimes(tuple(cost * ms for ms in stages), HOP_MS) for n, cost in ({1: 1.0} | CHEAP).items()}
    window, tokens = choose_depth(every, acceptance, len(stages))
    assert tokens > 1
    found, rows = play(stages, KnownAhead(rng, acceptance), CHEAP)
    assert rows > 100
    assert found == pytest.approx(mean_token_time(every[tokens], window, acceptance, tokens), rel=effort(15, 10) / 100)
    assert found < 0.9 * play(stages, KnownAhead(rng, acceptance), {})[0]


@pytest.mark.parametrize("stages", [(20.0,), (10.0, 10.0), (20.0, 5.0), (5.0,) * 4], ids=str)
def test_dear_rows_are_not_tried_and_wrong_guesses_cost_next_to_nothing(
    stages: tuple[float, ...], rng: random.Random
) -> None:
    assert play(stages, KnownAhead(rng, 0.8), DEAR)[1] == 0
    assert play(stages, KnownAhead(rng, 0.0), CHEAP)[0] < 1.02 * play(stages, None, {})[0]
