"""Sampling: the draws' distribution, what they depend on, penalties, bias and log-probabilities."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from cluster.core.limits import LEAST_REPETITION_PENALTY, MOST_REPETITION_PENALTY
from cluster.core.plan import ModelShape
from cluster.core.request import SamplingParams, TopLogprob
from cluster.model.sampler import Sampler, _min_p, _top_k, _top_p, draw_key, draw_noise
from model.ring import PROMPT, Ring, tokens

V = 16
LOGITS = [((i * 7) % V) * 0.35 - 2 for i in range(V)]
HISTORY = [1, 2, 3, 2, 5, 5, 5, 9]
"""Of which the first four are the prompt."""
PROMPT_LENGTH = 4


def pick(params: SamplingParams, position: int = len(HISTORY), logits: list[float] | None = None) -> int:
    picked = Sampler(params, PROMPT_LENGTH, V).pick(mx.array([logits or LOGITS]), HISTORY, position)
    return int(picked.token.item())  # type: ignore[arg-type]


def distribution(params: SamplingParams) -> list[float]:
    """Return the log-probabilities as they are reported."""
    sampler = Sampler(replace(params, logprobs=True, top_logprobs=V), PROMPT_LENGTH, V)
    picked = sampler.pick(mx.array([LOGITS]), HISTORY, len(HISTORY))
    return [top.logprob for top in sorted(sampler.alternatives(picked)[1], key=lambda top: top.token)]


def log_softmax(logits: list[float]) -> list[float]:
    norm = math.log(sum(math.exp(x) for x in logits))
    return [x - norm for x in logits]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 2,000 positions of one seed: 15 degrees of freedom, 0.1 % point 37.7."""
    draws, temperature = 2000, 0.8
    params = SamplingParams(temperature=temperature, seed=20)
    history, sampler = [0] * draws, Sampler(params, 0, V)
    drawn = [sampler.pick(mx.array([LOGITS]), history, i).token for i in range(draws)]
    counts = Counter(mx.concatenate(drawn).tolist())
    chances = [math.exp(x) for x in log_softmax([x / temperature for x in LOGITS])]
    assert sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(chances)) < 37.7


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_draw_depends_on_seed_and_position_alone(seed: int, position: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    history = [0] * (position % 7)
    mx.random.seed(position)
    a = Sampler(params, 0, V).pick(mx.array([LOGITS]), history, position).token.item()
    mx.random.seed(position + 1)
    assert a == Sampler(params, 0, V).pick(mx.array([LOGITS]), [], position).token.item()


def test_keys_differ_and_never_change() -> None:
    """The two pinned keys are the contract: another key is another text for the same seed."""
    keys = [tuple(draw_key(seed, at).tolist()) for seed in (0, 1, 2**32, 2**63) for at in range(50)]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    assert draw_key(0, 0).tolist() == PINNED[0]
    assert draw_key(2**64 - 1, 12345).tolist() == PINNED[1]
    assert draw_key(-1, 12345).tolist() == PINNED[1]


PINNED = ([3128965616, 440293811], [2456883705, 3278642266])


def test_a_draw_takes_the_best_of_log_probability_and_noise() -> None:
    """The token is the argmax of the log-probabilities over the temperature plus the noise of (seed, position)."""
    for seed in range(40):
        params = SamplingParams(temperature=0.8, top_k=5, seed=seed)
        filtered = _top_k(mx.array([log_softmax(LOGITS)]), 5)
        want = mx.argmax(filtered / 0.8 + draw_noise(seed, len(HISTORY), V))
        assert pick(params) == want.item()


def test_one_draw_is_that_of_several_rows() -> None:
    """A row draws the same token alone and among others, and in whatever row of a wider array."""
    rows = mx.random.normal((6, 300), key=mx.array([4, 2], dtype=mx.uint32)) * 3
    params = SamplingParams(temperature=1.0, seed=11)
    alone = [Sampler(params, 0, 300).pick(rows[i : i + 1], [], 9).token.item() for i in range(6)]
    assert alone == mx.argmax(rows + draw_noise(11, 9, 300), axis=-1).tolist()


def test_models_that_nearly_agree_draw_the_same_token_under_one_key() -> None:
    """A draft's draws agree at least (1 - d) / (1 + d) of the time, where d is the distance of the distributions."""
    width, draws = 1000, 400
    noise = mx.random.normal((2, width), key=mx.array([1, 7], dtype=mx.uint32))
    target, draft = noise[:1] * 4, noise[:1] * 4 + noise[1:] * 0.5
    distance = (0.5 * mx.abs(mx.softmax(target) - mx.softmax(draft)).sum()).item()
    params = SamplingParams(temperature=1.0, seed=5)
    samplers = [Sampler(params, 0, width) for _ in range(2)]
    same = sum(
        samplers[0].pick(target, [], at).token.item() == samplers[1].pick(draft, [], at).token.item()
        for at in range(draws)
    )
    assert isinstance(distance, float)
    assert same / draws > (1 - distance) / (1 + distance) - 0.05


def test_noise_excludes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's zero is noise of minus infinity; a filter may leave that one token alone."""
    forbidden = mx.full((1, V), -math.inf)
    monkeypatch.setattr(mx.random, "gumbel", lambda shape, key: forbidden)
    assert pick(SamplingParams(temperature=1.0, top_k=1)) == pick(SamplingParams())


@pytest.mark.parametrize("arch", ["llama_sliding", "mamba2"])
def test_a_seed_gives_the_same_text_at_any_number_of_stages(
    arch: str, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]
) -> None:
    hot = SamplingParams(temperature=0.9, top_p=0.95, seed=7)
    said = [tokens(Ring(shape(arch), checkpoint(arch), n).answer(hot, 16)) for n in (1, 2, 3)]
    assert said[0] == said[1] == said[2]
    one = Ring(shape(arch), checkpoint(arch), 1)
    assert tokens(one.answer(replace(hot, seed=8), 16)) != said[0]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(top_k=3), 3),
        (SamplingParams(top_k=V), V),
        (SamplingParams(top_k=500), V),
        (SamplingParams(min_p=0.5), 2),
        (SamplingParams(top_p=0.5), 2),
        (SamplingParams(top_p=1e-6), 1),
        (SamplingParams(), V),
    ],
)
def test_filters_leave_the_most_probable(params: SamplingParams, allowed: int) -> None:
    """At a high temperature every token that is left turns up in 600 draws, and no other does."""
    best = sorted(range(V), key=lambda i: -LOGITS[i])[:allowed]
    drawn = {pick(replace(params, temperature=20.0, seed=seed)) for seed in range(600)}
    assert drawn == set(best)


def test_filters_are_those_of_mlx_lm(rng: random.Random) -> None:
    """Bit for bit. Ours are not compiled: mlx-lm keeps a compiled variant for every value that it was ever given."""
    for _ in range(40):
        logprobs = mx.array([log_softmax([rng.gauss(0, 3) for _ in range(V)])])
        share, count = rng.choice((0.1, 0.5, 0.9)), rng.choice((1, 5))
        assert mx.array_equal(_top_p(logprobs, share), apply_top_p(logprobs, share)).item()
        assert mx.array_equal(_min_p(logprobs, share), apply_min_p(logprobs, share)).item()
        assert mx.array_equal(_top_k(logprobs, count), apply_top_k(logprobs, count)).item()


def test_temperature_zero_and_next_to_it_take_the_best() -> None:
    best = max(range(V), key=lambda i: LOGITS[i])
    assert {pick(SamplingParams(temperature=t, seed=3)) for t in (0.0, 1e-30, 1e-4)} == {best}


def test_repetition_penalty_looks_at_prompt_and_answer() -> None:
    want = [(x * 1.3 if x < 0 else x / 1.3) if i in HISTORY else x for i, x in enumerate(LOGITS)]
    assert distribution(SamplingParams(repetition_penalty=1.3)) == pytest.approx(log_softmax(want), abs=1e-5)


def test_presence_and_frequency_look_at_the_answer_alone() -> None:
    counts = Counter(HISTORY[PROMPT_LENGTH:])
    want = [x - 0.7 * (counts[i] > 0) - 0.25 * counts[i] for i, x in enumerate(LOGITS)]
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=0.25)
    assert distribution(params) == pytest.approx(log_softmax(want), abs=1e-5)


def test_bias_and_penalties_are_mlx_lms() -> None:
    """Over a history that is only answer, mlx-lm's own processors return the same, bit for bit."""
    params = SamplingParams(logit_bias=((3, 2.5), (5, -1.5)), repetition_penalty=1.2, presence_penalty=0.5)
    theirs = mx.array([LOGITS])
    for processor in make_logits_processors({3: 2.5, 5: -1.5}, 1.2, 1000, 0.5, 1000):
        theirs = processor(mx.array(HISTORY), theirs)
    sampler = Sampler(replace(params, logprobs=True), 0, V)
    ours = sampler.pick(mx.array([LOGITS]), HISTORY, len(HISTORY)).logprobs
    assert ours is not None
    assert mx.array_equal(ours, (theirs - mx.logsumexp(theirs, keepdims=True)).squeeze(0)).item()


def test_penalties_follow_a_history_that_grows_and_one_that_changes() -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, logprobs=True)

    def at_once(tokens: list[int]) -> mx.array:
        logprobs = Sampler(params, PROMPT_LENGTH, V).pick(mx.array([LOGITS]), tokens, len(tokens)).logprobs
        assert logprobs is not None
        return logprobs

    grown = Sampler(params, PROMPT_LENGTH, V)
    for end in range(PROMPT_LENGTH, len(HISTORY) + 1):
        logprobs = grown.pick(mx.array([LOGITS]), HISTORY, end).logprobs
        assert logprobs is not None
        assert mx.array_equal(logprobs, at_once(HISTORY[:end])).item()
    grown.forget()
    changed = [*HISTORY[:5], 11, 12, 13, 14, 15]
    logprobs = grown.pick(mx.array([LOGITS]), changed, len(changed)).logprobs
    assert logprobs is not None
    assert mx.array_equal(logprobs, at_once(changed)).item()


EXTREMES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 5e-324, 1e-45, 1.1e-5, 1e-3, 1.0, 2.0]),
        "top_p": st.sampled_from([5e-324, 1e-45, 1e-38, 1e-7, 0.5, 1.0 - 1e-16, 1.0]),
        "min_p": st.sampled_from([0.0, 5e-324, 1e-45, 1e-38, 0.5, 1.0]),
        "top_k": st.sampled_from([0, 1, V - 1, V]),
        "repetition_penalty": st.sampled_from([LEAST_REPETITION_PENALTY, 1.0, MOST_REPETITION_PENALTY]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 5e-324, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 5e-324, 2.0]),
        "logit_bias": st.sampled_from([(), tuple((i, 100.0) for i in range(V)), ((0, -100.0), (5, 100.0))]),
        "seed": st.integers(0, 2**64 - 1),
    }
)
"""The ends of the accepted ranges, and numbers that are zero in single precision."""
LONG = [5] * 40_000 + [0, 1]
ROWS = {
    "usual": LOGITS,
    "flat": [0.0] * V,
    "wide": [(-1.0) ** i * 6e4 for i in range(V)],
    "ruled out": [-math.inf if i % 3 else 60.0 * i for i in range(V)],
}


@given(EXTREMES, st.sampled_from(sorted(ROWS)), st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_setting_makes_a_number_none(given: dict[str, Any], row: str, dtype: mx.Dtype) -> None:
    """Even if a half-precision model's logits are close to the maximum and a token occurred often."""
    sampler = Sampler(SamplingParams(**given, logprobs=True), 1, V)
    picked = sampler.pick(mx.array([ROWS[row]], dtype=dtype), LONG, len(LONG))
    assert math.isfinite(float(picked.norm.item()))
    logprob, _ = sampler.alternatives(picked)
    assert logprob is not None
    assert math.isfinite(logprob)
    assert math.isfinite(ROWS[row][int(picked.token.item())])  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [[math.nan] * V, [math.inf, *LOGITS[1:]], [-math.inf] * V])
def test_what_the_model_says_that_is_no_number_stays_one(row: list[float]) -> None:
    """A fault of the model is reported, and not hidden by a penalty."""
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((3, 1.0),))
    picked = Sampler(params, PROMPT_LENGTH, V).pick(mx.array([row]), HISTORY, len(HISTORY))
    assert not math.isfinite(float(picked.norm.item()))


def test_logit_bias_forbids_and_forces() -> None:
    best = max(range(V), key=lambda i: LOGITS[i])
    assert pick(SamplingParams(logit_bias=((best, -100.0),))) != best
    assert pick(SamplingParams(logit_bias=((4, 100.0),), temperature=1.0, seed=1)) == 4


def test_logprobs_are_those_before_temperature() -> None:
    want = log_softmax(LOGITS)
    assert distribution(SamplingParams(temperature=3.0)) == pytest.approx(want, abs=1e-5)
    sampler = Sampler(SamplingParams(logprobs=True, top_logprobs=3), 0, V)
    picked = sampler.pick(mx.array([LOGITS]), [], 0)
    own, top = sampler.alternatives(picked)
    best = sorted(range(V), key=lambda i: -want[i])[:3]
    assert own == pytest.approx(want[best[0]], abs=1e-5)
    assert [t.token for t in top] == best
    assert all(isinstance(t, TopLogprob) for t in top)


def test_logprobs_are_not_computed_unasked() -> None:
    sampler = Sampler(SamplingParams(top_logprobs=3), 0, V)
    assert sampler.alternatives(sampler.pick(mx.array([LOGITS]), [], 0)) == (None, ())


def test_ties_go_to_the_smaller_token() -> None:
    sampler = Sampler(SamplingParams(logprobs=True, top_logprobs=V), 0, V)
    picked = sampler.pick(mx.zeros((1, V)), [], 0)
    assert picked.token.item() == 0
    assert [t.token for t in sampler.alternatives(picked)[1]] == list(range(V))


def test_penalties_through_a_ring(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> None:
    """A hundredfold repetition penalty: no token of the prompt or the answer comes again, at any number of stages."""
    never = SamplingParams(repetition_penalty=1e6, presence_penalty=100.0)
    said = [tokens(Ring(shape("llama"), checkpoint("llama"), n).answer(never, 20)) for n in (1, 2)]
    assert said[0] == said[1]
    assert len(set(said[0])) == 20
    assert not set(said[0]) & set(PROMPT)
