"""A prefill step reports the log-probabilities that one forward of mlx-lm gives the prompt, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

import cluster.model.prompt_scoring as prompt_scoring
from cluster.core.errors import BadFrame, StageFailed
from cluster.core.frames import Compute, Frame, Join, Leave, PromptScoring, Step
from cluster.core.plan import ModelShape
from cluster.core.request import PromptLogprobs, SamplingParams
from cluster.model.prompt_scoring import score_prompt
from model.ring import CHUNKS, PROMPT, Ring

Checkpoints = Callable[[str], Path]
Shapes = Callable[[str], ModelShape]
GREEDY = SamplingParams(temperature=1.5, logit_bias=((3, 9.0),), repetition_penalty=1.5)
"""Nothing of it may change what the model says of its prompt."""
TOP = 3


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoints) -> Callable[[str], mx.array]:
    """Architecture -> the log-probabilities [position, vocabulary] of the whole prompt in one forward of mlx-lm."""

    def forward(arch: str) -> mx.array:
        model, _ = load_model(checkpoint(arch))
        logits = model(mx.array([PROMPT]))
        found: mx.array = nn.log_softmax(logits[0].astype(mx.float32), axis=-1)
        mx.eval(found)
        return found

    return cache(forward)


@pytest.fixture(scope="module")
def rings(checkpoint: Checkpoints, shape: Shapes) -> Callable[[str, int], Ring]:
    return cache(lambda arch, stages: Ring(shape(arch), checkpoint(arch), stages))


def scored(ring: Ring, chunks: Sequence[int], top: int = TOP, skip: int = 0) -> list[PromptLogprobs]:
    """What the ring reports of the prompt, chunk by chunk, without the first ``skip`` positions of each chunk."""
    ring.send(Join(1, len(PROMPT), GREEDY))
    bounds = [0]
    for size in chunks:
        bounds.append(min(bounds[-1] + size, len(PROMPT) - 1))
    replies = []
    for start, end in pairwise(bounds):
        scoring = PromptScoring(skip, PROMPT[start + 1 + skip : end + 1], top)
        reply = ring.send(step=Step(Compute.PREFILL, (1,), (PROMPT[start:end],), scoring))
        assert reply.prompt_logprobs is not None
        assert reply.samples == ()
        replies.append(reply.prompt_logprobs)
    ring.send(Leave(1))
    return replies


@pytest.mark.parametrize("chunks", [(40,), CHUNKS, (1,) * 40], ids=["whole", "uneven", "single"])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("arch", ["llama", "llama_sliding", "qwen3_next"])
def test_a_prompt_gets_the_log_probabilities_of_one_forward(
    arch: str,
    stages: int,
    chunks: tuple[int, ...],
    rings: Callable[[str, int], Ring],
    expected: Callable[[str], mx.array],
) -> None:
    """Bit for bit in float32 on a CPU, but for a sliding window that is fed one by one: it adds in another order."""
    want = expected(arch)
    replies = scored(rings(arch, stages), chunks)
    assert [r.start for r in replies] == [1 + sum(chunks[:i]) for i in range(len(chunks))]
    values = [value for r in replies for value in r.logprobs]
    tops = [r.top(i) for r in replies for i in range(len(r.logprobs))]
    exact = arch != "llama_sliding" or len(chunks) < 40
    assert values == within([want[i, token].item() for i, token in enumerate(PROMPT[1:])], exact)
    for i, top in enumerate(tops):
        assert [t.token for t in top] == mx.argsort(-want[i])[:TOP].tolist()
        assert [t.logprob for t in top] == within(sorted(want[i].tolist(), reverse=True)[:TOP], exact)


def within(values: list[float], exact: bool) -> object:
    return values if exact else pytest.approx(values, abs=2e-5)


@pytest.mark.parametrize("skip", [0, 3, 6])
def test_positions_that_are_known_already_are_not_reported(
    skip: int, rings: Callable[[str, int], Ring], expected: Callable[[str], mx.array]
) -> None:
    replies = scored(rings("llama", 2), CHUNKS, top=0, skip=skip)
    want = expected("llama")
    for r in replies:
        assert r.top(0) == ()
        assert list(r.logprobs) == [want[i - 1, PROMPT[i]] for i in range(r.start, r.start + len(r.logprobs))]
    assert [r.start for r in replies] == [1 + skip, 8 + skip, 27 + skip]


def test_the_answer_goes_on_as_without_a_report(rings: Callable[[str, int], Ring]) -> None:
    ring = rings("qwen3_next", 2)
    whole = ring.answer(SamplingParams(), 6)
    ring.send(Join(1, len(PROMPT), SamplingParams()))
    ring.send(step=Step(Compute.PREFILL, (1,), (PROMPT[:-1],), PromptScoring(0, PROMPT[1:], 20)))
    assert ring.go_on(1, PROMPT[-1], 6) == whole
    ring.send(Leave(1))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_slices_of_positions_give_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = mx.random.normal((1, 50, 300), key=mx.random.key(3)).astype(mx.bfloat16)
    scoring = PromptScoring(5, tuple(range(40)), 4)
    whole = score_prompt(logits, scoring, 6)
    monkeypatch.setattr(prompt_scoring, "SCORED_SLICE_LOGITS", rows * 300)
    assert score_prompt(logits, scoring, 6) == whole
    assert whole.logprobs == tuple(nn.log_softmax(logits[0, 5 + i].astype(mx.float32))[i].item() for i in range(40))


def test_impossible_alternatives_are_left_out_and_an_impossible_token_is_minus_infinity() -> None:
    logits = mx.where(mx.arange(9) == 4, 0.0, -mx.inf)[None, None]
    found = score_prompt(logits, PromptScoring(0, (5,), 20), 1)
    assert found.logprobs == (-math.inf,)
    assert [(t.token, t.logprob) for t in found.top(0)] == [(4, 0.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_not_finite_is_an_error_that_names_the_position(value: float) -> None:
    logits = mx.zeros((1, 9, 8))
    logits[0, 6] = value
    with pytest.raises(StageFailed, match="position 10 is not finite"):
        score_prompt(logits, PromptScoring(0, (1,) * 9, 1), 4)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step(Compute.DECODE, (1,), ((1,),), PromptScoring(0, (2,), 0)), "only a prefill step"),
        (Step(Compute.PREFILL, (1, 2), ((1,), (1,)), PromptScoring(0, (2,), 0)), "only a prefill step"),
        (Step(Compute.PREFILL, (1,), ((1, 2),), PromptScoring(0, (), 0)), "cannot report 0"),
        (Step(Compute.PREFILL, (1,), ((1, 2),), PromptScoring(1, (2, 3), 0)), "of which 1 are skipped"),
        (Step(Compute.PREFILL, (1,), ((1, 2),), PromptScoring(0, (2, 320), 0)), "asks for token 320"),
        (Step(Compute.PREFILL, (1,), ((1, 2),), PromptScoring(0, (2,), 0)), "too much memory"),
    ],
)
def test_an_impossible_report_is_refused_by_every_stage(
    step: Step, words: str, rings: Callable[[str, int], Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words == "too much memory":
        monkeypatch.setattr(prompt_scoring, "MAX_SCORED_LOGITS", 600)
    for stage in rings("llama", 2).stages:
        with pytest.raises(BadFrame, match=words):
            stage.step(Frame(1, 0, 0, (Join(1, 9, GREEDY), Join(2, 9, GREEDY)), step))
        stage.step(Frame(1, 0, 0, (Leave(1), Leave(2))))
