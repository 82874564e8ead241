"""Real stages under the real scheduler: with any guesser, samples and kept prefixes are bit for bit those without."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoints import make
from cluster.coordinator.active_requests import split_samples
from cluster.core.frames import Frame, Sample, StageTiming
from cluster.core.plan import ModelShape
from cluster.core.request import Grammar, GrammarKind, Request, SamplingParams
from cluster.model.model_shape import read_shape
from cluster.model.stage import Stage
from cluster.scheduler import guess_chains
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.guessing import Guess, Guesser, GuessSource
from cluster.scheduler.outcome import Produced
from cluster.scheduler.reordering import ReorderBuffer
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.verify_length import Depth
from effort import chosen, effort
from model.ring import PROMPT, Ring

KINDS = ("llama", "llama_sliding", "gemma3_text", "qwen3_next", "mamba2", "rwkv7", "falcon_h1", "deepseek_v41")
LOGPROBS = SamplingParams(logprobs=True, top_logprobs=3)
SAMPLINGS = (
    LOGPROBS,
    replace(LOGPROBS, temperature=0.9, top_p=0.9, top_k=40, seed=5),
    replace(LOGPROBS, temperature=1.0, seed=6, repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.3),
    replace(LOGPROBS, temperature=1.1, seed=7, logit_bias=((9, 3.0), (11, -4.0))),
    replace(LOGPROBS, temperature=1.0, seed=8, grammar=Grammar(GrammarKind.REGEX, "([a-f]{1,3}[0-9]+;)*")),
)
END = frozenset({259, 262})
"""The ends of an answer of these checkpoints."""
Rings = Callable[[str, int], Ring]
Said = dict[str, list[tuple[Sample, bool]]]


@pytest.fixture(scope="module")
def rings(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    """Architecture and number of stages -> a ring that tests leave empty."""
    return cache(lambda arch, stages: Ring(shape(arch), checkpoint(arch), stages))


Wrong = Callable[[random.Random, Sample], int]
"""Returns the token that is guessed in place of a sample's own."""


def random_token(rng: random.Random, sample: Sample) -> int:
    return rng.randrange(250)


def constant_token(rng: random.Random, sample: Sample) -> int:
    return 9


def next_best_token(rng: random.Random, sample: Sample) -> int:
    """Return the likeliest token that was not sampled: the guess that comes closest and is wrong."""
    return next((one.token for one in sample.top if one.token != sample.token), (sample.token + 1) % 250)


class Replay:
    """Guesses what was said before; with the probability ``error``, a token that ``wrong`` returns."""

    def __init__(self, rng: random.Random, said: Said, error: float, wrong: Wrong = random_token) -> None:
        self.rng, self.said, self.error, self.wrong = rng, said, error, wrong

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        at = len(tokens) - len(request.prompt)
        truth = [sample for sample, _ in self.said[request.id]][at : at + count]
        found = [self.wrong(self.rng, one) if self.rng.random() < self.error else one.token for one in truth]
        return Guess(tuple(found), GuessSource.REPLAY) if found else None

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None: ...

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None: ...

    def observe(self, request: Request, tokens: Sequence[int]) -> None: ...

    def forget(self, request: Request) -> None: ...

    def forget_client(self, client: str) -> None: ...


class Play:
    """A scheduler and real stages, which work in any order that their turns allow.

    ``stops`` says after how many tokens a request is ended from outside, as at a stop string.
    """

    def __init__(
        self, ring: Ring, shape: ModelShape, rng: random.Random, guesser: Guesser | None, *, rows: bool = False
    ) -> None:
        self.ring, self.rng, self.now = ring, rng, 0.0
        stages = len(ring.stages)
        costs = dict.fromkeys((2, 3, 5), (1.0,) * stages) if rows else {}
        marks = None if shape.trimmable else lambda tokens: (1,) * stages
        room = (10**6,) * stages
        plan = Capacity(
            stages, 4 if shape.batchable else 1, 3, room, room, lambda tokens: (tokens,) * stages, marks, chunk=32,
            verify_costs=costs,
        )  # fmt: skip
        self.scheduler = Scheduler(1, plan, END, guesser)
        self.turns = [ReorderBuffer() for _ in ring.stages]
        self.void: set[int] = set()
        self.said: Said = defaultdict(list)
        self.stops: dict[str, int] = {}

    def write(self) -> None:
        self.now += 0.001
        for frame in (*self.scheduler.next_frames(self.now), *self.scheduler.guess_frames(self.now)):
            self.turns[0].add(frame, ready=True)

    def advance(self, at: int) -> None:
        frame = self.turns[at].take()
        if frame is None:
            return
        if frame.void and frame.number not in self.void and self.rng.random() < 0.5 and _has_tensors(at, frame):
            frame = replace(frame, void=False)
        stage: Stage = self.ring.stages[at]
        frame = self.ring.passed(stage.step(frame))
        if frame.void:
            self.void.add(frame.number)
        if at + 1 < len(self.turns):
            self.turns[at + 1].add(frame, ready=True)
            return
        timings = tuple(StageTiming(i, 0, 1000, 0) for i in range(len(self.turns)))
        for event in self.scheduler.on_frame(replace(frame, timings=timings), self.now).events:
            assert isinstance(event, Produced), event
            self.said[event.request_id].append((replace(event.sample, sequence=0), event.finish is not None))
            if self.stops.get(event.request_id) == len(self.said[event.request_id]):
                self.scheduler.end(event.request_id)
        self.write()

    def answer(self, requests: Sequence[Request], together: int) -> Said:
        """Answer the requests, ``together`` of them at once. Nothing stays on the stages but prefixes."""
        waiting = list(requests)
        while waiting or self.scheduler.sequences or self.scheduler.in_flight:
            while waiting and len(self.scheduler.sequences) < together:
                self.scheduler.submit(waiting.pop(0))
                self.write()
            self.advance(self.rng.randrange(len(self.turns)))
            if not self.scheduler.in_flight:
                self.now += 1.0
                self.write()
        for stage in self.ring.stages:
            assert stage.sequences == 0
            assert stage.prefixes == len(self.scheduler.prefixes)
        return dict(self.said)

    def close(self) -> None:
        """Drop all prefixes."""
        for stage in self.ring.stages:
            stage.begin_epoch(stage.spec)


def _has_tensors(at: int, frame: Frame) -> bool:
    return at == 0 or bool(frame.tensors)


def conversation(count: int, max_tokens: int) -> list[Request]:
    """Requests with all kinds of sampling; some go on from the same beginning."""
    found = []
    for i in range(count):
        prompt = PROMPT[: 20 + 3 * (i % 4)] + PROMPT[i : i + 1] * (i % 3)
        found.append(Request(f"r{i}", prompt, SAMPLINGS[i % len(SAMPLINGS)], max_tokens))
    return found


@pytest.mark.timeout(effort(60, 900))
@pytest.mark.parametrize("arch", chosen(KINDS, "llama", "llama_sliding", "qwen3_next"))
def test_any_guesser_leaves_every_sample_bit_for_bit(
    arch: str, rings: Rings, shape: Callable[[str], ModelShape]
) -> None:
    requests = conversation(6, 12)
    alone = Play(rings(arch, 2), shape(arch), random.Random(0), None)
    plain = alone.answer(requests, 1)
    alone.close()
    assert sum(len(samples) for samples in plain.values()) > 40

    @settings(max_examples=effort(2, 30), deadline=None, suppress_health_check=[*HealthCheck], database=None)
    @given(
        st.integers(0, 2**32),
        st.sampled_from((0.0, 0.3, 1.0)),
        st.integers(1, 4),
        st.sampled_from((1, 1, 2)),
        st.booleans() if arch == "llama" else st.just(False),  # only there are rows bit for bit those of one token
        st.sampled_from((random_token, constant_token, next_best_token)),
    )
    @example(1, 1.0, 3, 1, False, constant_token)
    @example(2, 1.0, 3, 1, False, next_best_token)
    def check(seed: int, error: float, stages: int, together: int, rows: bool, wrong: Wrong) -> None:
        rng = random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: rng.randint(1, max(1, most)))
            patch.setattr(
                guess_chains,
                "choose_depth",
                lambda steps, _, most: Depth(rng.randint(1, max(1, most)), rng.choice(sorted(steps))),
            )
            play = Play(rings(arch, stages), shape(arch), rng, Replay(rng, plain, error, wrong), rows=rows)
            said = play.answer(requests, together if stages > 1 else 1)  # one lane would turn their windows
        counts = play.scheduler.speculation.counts.by_source
        play.close()
        assert said == plain
        assert stages == 1 or together > 1 or counts[GuessSource.REPLAY].guessed

    check()


def test_a_next_turn_that_starts_from_a_guessed_answers_prefix_is_that_of_a_fresh_start(
    rings: Rings, shape: Callable[[str], ModelShape], rng: random.Random
) -> None:
    """An answer whose last guesses were wrong is kept; the next turn of the chat starts from it."""
    ring, known = rings("llama", 3), shape("llama")
    first = Request("r0", PROMPT, LOGPROBS, 12)
    fresh = Play(ring, known, rng, None)
    plain = fresh.answer([first], 1)
    fresh.close()
    second = Request("r1", (*PROMPT, *(s.token for s, _ in plain["r0"]), 8, 9), LOGPROBS, 8)
    fresh = Play(ring, known, rng, None)
    plain |= fresh.answer([second], 1)
    fresh.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: most)
        play = Play(ring, known, rng, Replay(rng, plain, 0.5))
        said = play.answer([first], 1)
        play.scheduler.submit(second)
        (sequence,) = play.scheduler.sequences
        assert sequence.cached >= len(PROMPT) + 11
        said |= play.answer([], 1)
    play.close()
    assert said == plain


@pytest.fixture
def longest_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every guess that may be sent, whatever it costs."""
    monkeypatch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: max(1, most))


@pytest.mark.usefixtures("longest_chains")
def test_samples_of_one_prompt_are_those_without_guesses(
    rings: Rings, shape: Callable[[str], ModelShape], rng: random.Random
) -> None:
    """Two samples are guessed in lanes of their own. One prompt is read for both."""
    ring, known = rings("llama", 4), shape("llama")
    samples = split_samples(Request("r", PROMPT, SAMPLINGS[2], 12, samples=2))
    alone = Play(ring, known, rng, None)
    plain = alone.answer(samples, 1)
    alone.close()
    play = Play(ring, known, rng, Replay(rng, plain, 0.2))
    play.scheduler.submit(*samples)
    play.write()
    said = play.answer([], 2)
    play.close()
    assert said == plain
    assert said["r"] != said["r#1"]
    assert play.scheduler.speculation.counts.by_source[GuessSource.REPLAY].accepted


@pytest.mark.usefixtures("longest_chains")
@pytest.mark.parametrize("arch", chosen(("llama", "qwen3_next"), "llama"))
def test_an_answer_that_a_stop_string_ends_drops_its_guesses(
    arch: str, rings: Rings, shape: Callable[[str], ModelShape], rng: random.Random
) -> None:
    """Whatever is in flight as its reader ends it, the prefix that it leaves is the right one for the next turn."""
    ring, known, stop = rings(arch, 3), shape(arch), 5
    first = Request("r0", PROMPT, SAMPLINGS[3], 30)
    fresh = Play(ring, known, rng, None)
    fresh.stops["r0"] = stop
    plain = fresh.answer([first], 1)
    fresh.close()
    second = Request("r1", (*PROMPT, *(s.token for s, _ in plain["r0"]), 8), LOGPROBS, 3)
    fresh = Play(ring, known, rng, None)
    plain |= fresh.answer([second], 1)
    fresh.close()
    play = Play(ring, known, rng, Replay(rng, {**plain, "r0": plain["r0"] * 2}, 0.3))
    play.stops["r0"] = stop
    said = play.answer([first], 1)
    play.scheduler.submit(second)
    (sequence,) = play.scheduler.sequences
    assert sequence.cached >= len(PROMPT) - 1
    said |= play.answer([], 1)
    play.close()
    assert len(said["r0"]) == stop
    assert said == plain
    assert play.scheduler.speculation.counts.by_source[GuessSource.REPLAY].voided


@pytest.mark.usefixtures("longest_chains")
def test_quantized_caches_are_guessed_bit_for_bit(tmp_path: Path, rng: random.Random) -> None:
    path = make("llama", tmp_path / "wide", layers=6, head_dim=64)
    known = read_shape(path, "wide", 300, kv_bits=8)
    ring = Ring(known, path, 2, kv_bits=8)
    requests = [request for request in conversation(len(SAMPLINGS), 8) if request.id in ("r2", "r4")]
    alone = Play(ring, known, rng, None)
    plain = alone.answer(requests, 1)
    alone.close()
    play = Play(ring, known, rng, Replay(rng, plain, 0.3))
    said = play.answer(requests, 1)
    play.close()
    assert said == plain
    counts = play.scheduler.speculation.counts.by_source[GuessSource.REPLAY]
    assert counts.accepted
    assert counts.voided
