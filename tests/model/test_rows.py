"""Rows of guesses in one step: what is sampled of them is what steps of one token sample, and nothing behind a miss."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Edit, Frame, Join, Leave, Sample, Step, Trim
from cluster.core.limits import MAX_VERIFIED
from cluster.core.plan import ModelShape
from cluster.core.request import Grammar, GrammarKind, SamplingParams
from effort import chosen
from model.ring import ALL, PROMPT, Ring, logprobs, tokens

LOGPROBS = replace(ALL, top_logprobs=3)
SAMPLINGS = {
    "greedy": ALL,
    "plain": SamplingParams(),
    "seeded": replace(LOGPROBS, temperature=1.0, top_p=0.9, seed=7),
    "penalised": replace(
        LOGPROBS, temperature=1.0, seed=11, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2,
        logit_bias=((7, 1.5),),
    ),
    "grammar": replace(
        LOGPROBS, temperature=1.0, seed=8, grammar=Grammar(GrammarKind.REGEX, "([a-f]{1,3}[0-9]+;){24,}")
    ),
}  # fmt: skip
COUNT = 24
Rings = Callable[[str], Ring]


@pytest.fixture(scope="module")
def rings(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    """Architecture -> a ring of two stages that tests leave empty."""
    return cache(lambda arch: Ring(shape(arch), checkpoint(arch), 2))


class Rows:
    """A sequence that is fed rows of guesses, of which ``error`` are wrong."""

    def __init__(self, ring: Ring, rng: random.Random, sampling: SamplingParams, right: Sequence[Sample]) -> None:
        self.ring, self.rng, self.right = ring, rng, tokens(right)
        self.said: list[Sample] = []
        self.rows: list[int] = []
        self.edits: tuple[Edit, ...] = ()
        ring.send(Join(1, len(PROMPT), sampling))
        ring.prefill(1, PROMPT[:-1])

    def send(self, row: Sequence[int], guesses: int, start: int) -> Frame:
        edits, self.edits = self.edits, ()
        return self.ring.send_alone(
            *edits, step=Step(Compute.DECODE, (1,), (tuple(row),), guesses=guesses, start=start)
        )

    def answer(self, error: float) -> list[Sample]:
        token = PROMPT[-1]
        while len(self.said) < COUNT:
            guessed = self.guess(len(self.said), self.rng.randrange(MAX_VERIFIED), error)
            start = len(PROMPT) - 1 + len(self.said)
            right = self.take(self.send((token, *guessed), len(guessed), start), guessed)
            while right and len(self.said) < COUNT:
                right = self.follow(self.guess(len(self.said) - 1, self.rng.randrange(4) + 1, error))
            token = self.said[-1].token
        self.ring.send(Leave(1))
        return self.said

    def follow(self, guessed: list[int]) -> bool:
        """Send a row of guesses alone. The next step trims what the stages hold of it in vain."""
        start = len(PROMPT) - 1 + len(self.said)
        frame = self.send(guessed, len(guessed) + self.rng.randrange(3), start)
        assert frame.void == (guessed[0] != self.said[-1].token)
        if frame.void:
            self.edits = (Trim(1, start),)
            return False
        return self.take(frame, guessed[1:])

    def guess(self, at: int, count: int, error: float) -> list[int]:
        """Guess up to ``count`` tokens of the answer from its token ``at`` on. Guesses go on behind a wrong one."""
        truth = self.right[at : min(at + count, COUNT - 1)]
        return [(token + 1) % 250 if self.rng.random() < error else token for token in truth]

    def take(self, frame: Frame, guessed: Sequence[int]) -> bool:
        """Take what was sampled, up to the first wrong guess. Return whether there was none."""
        assert not frame.failures
        truth = self.right[len(self.said) : len(self.said) + len(guessed)]
        right = next((i for i, (a, b) in enumerate(zip(guessed, truth, strict=True)) if a != b), len(guessed))
        assert len(frame.samples) == right + 1
        self.said += frame.samples
        self.rows.append(len(frame.samples))
        if right < len(guessed):
            self.edits = (Trim(1, len(PROMPT) - 1 + len(self.said)),)
        return right == len(guessed)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("arch", chosen(("llama", "qwen3_moe"), "llama"))
def test_rows_leave_the_answer_bit_for_bit(
    arch: str, sampling: SamplingParams, rings: Rings, rng: random.Random
) -> None:
    """In float32 on a CPU these models compute each row as alone."""
    ring = rings(arch)
    plain = ring.answer(sampling, COUNT)
    for error in (0.0, 0.2, 1.0):
        rows = Rows(ring, rng, sampling, plain)
        assert rows.answer(error) == plain
        assert max(rows.rows) > 1 or error == 1.0
    assert all((stage.sequences, stage.cache_bytes) == (0, 0) for stage in ring.stages)


def test_where_rows_change_bits_tokens_are_those_whose_margin_is_wider(rings: Rings, rng: random.Random) -> None:
    ring = rings("deepseek_v3")
    plain = ring.answer(ALL, COUNT)
    margins = [mx.sort(logprobs(sample))[-2:] for sample in plain]
    assert min((pair[1] - pair[0]).item() for pair in margins) > 1e-3, "no near tie: another prompt is needed"
    rows = Rows(ring, rng, ALL, plain).answer(0.2)
    assert tokens(rows) == tokens(plain)
    changed = [mx.max(mx.abs(logprobs(a) - logprobs(b))).item() for a, b in zip(rows, plain, strict=True)]
    assert 0 < max(changed) < 1e-3


def test_a_grammar_that_is_complete_ends_the_row(rings: Rings, rng: random.Random) -> None:
    ring = rings("llama")
    sampling = SamplingParams(temperature=1.0, seed=3, grammar=Grammar(GrammarKind.REGEX, "[a-f]{4}"))
    plain = ring.answer(sampling, 2)
    while not plain[-1].final:
        plain = ring.answer(sampling, len(plain) + 1)
    rows = Rows(ring, rng, sampling, plain)
    row = (PROMPT[-1], *tokens(plain), 9)
    assert list(rows.send(row, len(row) - 1, len(PROMPT) - 1).samples) == plain
    ring.send(Leave(1))


@pytest.mark.parametrize(("wrong_from", "fails"), [(3, True), (2, True), (1, False)])
def test_only_a_position_after_right_guesses_can_fail(
    wrong_from: int, fails: bool, rings: Rings, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of four positions is not a number. What comes before it is reported."""
    ring = rings("llama")
    sampling = replace(LOGPROBS, temperature=1.0, seed=7)
    plain = ring.answer(sampling, 4)
    guesses = [t if i < wrong_from else t + 1 for i, t in enumerate(tokens(plain)[:3])]
    part = ring.stages[-1]._require_loaded()
    run = part.run

    def spoiled(*asked: Any) -> list[mx.array]:
        logits, *more = run(*asked)
        bad = mx.where(mx.arange(logits.shape[1])[None, :, None] == 2, mx.array(float("nan")), logits)
        return [bad, *more]

    monkeypatch.setattr(part, "run", spoiled)
    rows = Rows(ring, rng, sampling, plain)
    reply = rows.send((PROMPT[-1], *guesses), 3, len(PROMPT) - 1)
    assert list(reply.samples) == plain[: min(wrong_from + 1, 2)]
    assert [f"position {len(PROMPT) + 2} is not finite" in f.sentence for f in reply.failures] == [True] * fails
    ring.send(Leave(1))


def test_a_row_samples_a_bounded_number_of_positions(rings: Rings, rng: random.Random) -> None:
    rows = Rows(rings("llama"), rng, ALL, [])
    with pytest.raises(BadFrame, match="samples 9 tokens of sequence 1; at most 8"):
        rows.send(PROMPT[:9], 8, len(PROMPT) - 1)
    rows.ring.send(Leave(1))
