"""Steps of guesses: whether they are right, wrong, void or skipped, tokens and log-probabilities are those without."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, Join, Leave, Sample, Step, Trim
from cluster.core.plan import ModelShape
from cluster.core.request import SamplingParams
from effort import chosen
from model.ring import ALL, PROMPT, Ring

KINDS = ("llama", "llama_sliding", "qwen3_next", "mamba2", "deepseek_v41")
"""Caches that grow, that rotate, that hold states, mixtures, and a class of its own."""
SAMPLINGS = {
    "greedy": ALL,
    "seeded": replace(ALL, temperature=1.0, top_p=0.9, seed=7),
    "penalised": replace(
        ALL, temperature=1.0, seed=11, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2,
        logit_bias=((7, 1.5),),
    ),
}  # fmt: skip
Rings = Callable[[str], Ring]


@pytest.fixture(scope="module")
def rings(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    """Architecture -> a ring of two stages that tests leave empty."""
    return cache(lambda arch: Ring(shape(arch), checkpoint(arch), 2))


class Guessed:
    """A sequence that is fed guesses, of which ``error`` are wrong, over stages that skip some of those."""

    def __init__(self, ring: Ring, rng: random.Random, sampling: SamplingParams, right: list[Sample]) -> None:
        self.ring, self.rng, self.right = ring, rng, [sample.token for sample in right]
        self.said: list[Sample] = []
        self.trims = 0
        ring.send(Join(1, len(PROMPT), sampling))
        ring.prefill(1, PROMPT[:-1])

    def send(self, token: int, start: int, guesses: int, *edits: Trim, skip_from: int = 9) -> Frame:
        """One frame around the ring; from stage ``skip_from`` on it is void."""
        step = Step(Compute.DECODE, (1,), ((token,),), guesses=guesses, start=start)
        frame = Frame(1, 0, 0, edits, step)
        for i, stage in enumerate(self.ring.stages):
            if i == skip_from:
                frame = replace(frame, void=True, tensors=())
            frame = self.ring.passed(stage.step(frame))
        return frame

    def answer(self, count: int, error: float) -> list[Sample]:
        token, edits = PROMPT[-1], tuple[Trim, ...]()
        while len(self.said) < count:
            self.said += self.send(token, len(PROMPT) - 1 + len(self.said), 0, *edits).samples
            edits = self._guess(error, count)
            token = self.said[-1].token
        self.ring.send(Leave(1))
        return self.said

    def _guess(self, error: float, count: int) -> tuple[Trim, ...]:
        """Feed guesses until one is wrong. Return the edit that drops it, and those behind it."""
        for depth in range(1, 4):
            if len(self.said) >= count:
                return ()
            truth, start = self.right[len(self.said) - 1], len(PROMPT) - 1 + len(self.said)
            if self.rng.random() >= error:
                (sample,) = self.send(truth, start, depth).samples
                self.said.append(sample)
                continue
            for behind in range(self.rng.randint(1, 2)):
                wrong = self.rng.choice([t for t in range(250) if t != truth])
                frame = self.send(wrong, start + behind, depth + behind, skip_from=self.rng.randint(0, 2))
                assert frame.void
                assert not frame.samples
            self.trims += 1
            return (Trim(1, start),)
        return ()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("arch", chosen(KINDS, "llama", "llama_sliding", "qwen3_next"))
def test_guesses_leave_the_answer_bit_for_bit(
    arch: str, sampling: SamplingParams, rings: Rings, rng: random.Random
) -> None:
    ring = rings(arch)
    plain = ring.answer(sampling, 14)
    guessed = Guessed(ring, rng, sampling, plain)
    assert guessed.answer(14, 0.4) == plain
    guessed = Guessed(ring, rng, sampling, plain)
    assert guessed.answer(14, 1.0) == plain
    assert guessed.trims == 13
    assert all((stage.sequences, stage.cache_bytes) == (0, 0) for stage in ring.stages)


def test_marks_of_guesses_are_dropped_once_the_guesses_are_right(rings: Rings, rng: random.Random) -> None:
    ring = rings("mamba2")
    guessed = Guessed(ring, rng, ALL, ring.answer(ALL, 20))
    at, token = len(PROMPT) - 1, PROMPT[-1]
    (sample,) = guessed.send(token, at, 0).samples
    before = [stage.cache_bytes for stage in ring.stages]
    for i in range(1, 12):
        (sample,) = guessed.send(sample.token, at + i, 1).samples
        assert all(b < s.cache_bytes <= 2 * b for s, b in zip(ring.stages, before, strict=True))
    guessed.send(sample.token, at + 12, 0)
    assert [stage.cache_bytes for stage in ring.stages] == before
    ring.send(Leave(1))


def test_a_step_that_starts_elsewhere_is_refused(rings: Rings, rng: random.Random) -> None:
    ring = rings("llama")
    guessed = Guessed(ring, rng, ALL, [])
    with pytest.raises(BadFrame, match="starts at token 45 of sequence 1, not 40"):
        guessed.send(PROMPT[-1], 45, 0)
    ring.send(Leave(1))


@pytest.mark.parametrize(
    "step",
    [
        Step(Compute.DECODE, (1, 2), ((1,), (1,)), guesses=1, start=40),
        Step(Compute.DECODE, (1,), ((1,),), guesses=1),
        Step(Compute.PREFILL, (1,), ((1,),), guesses=1, start=40),
    ],
)
def test_guesses_belong_to_one_sequence_that_decodes(step: Step, rings: Rings, rng: random.Random) -> None:
    ring = rings("llama")
    Guessed(ring, rng, ALL, [])
    with pytest.raises(BadFrame, match="cannot feed guesses"):
        ring.send(step=step)
    ring.send(Leave(1))
