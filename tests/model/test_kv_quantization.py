"""Keys and values in 4 or 8 bits: mlx-lm's own numbers at any number of stages, and refusals with a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from checkpoints import make
from cluster.core.errors import BadFrame, InvalidOption, ModelUnsupported
from cluster.core.frames import Compute, Join, Leave, Restore, Save, Step
from cluster.core.plan import LayerRange
from cluster.model.model_shape import read_shape
from effort import chosen
from model.ring import ALL, PROMPT, Ring, logprobs, open_stage, tokens

ANSWER = 10
CHUNK = 8
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 32},
    "qwen3_next": {"head_dim": 32},
    "hunyuan": {"head_dim": 32, "hidden_size": 128},  # its heads are as wide as its hidden size allows
}
"""Heads wide enough to be quantized; 32 takes the smaller groups."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda arch: make(arch, tmp_path_factory.mktemp(arch), layers=6, **WIDE[arch]))


def quantized(path: Path, bits: int, stages: int, context: int = 300) -> Ring:
    return Ring(read_shape(path, path.name, context, kv_bits=bits), path, stages, kv_bits=bits)


def chunks(count: int) -> tuple[int, ...]:
    return (CHUNK,) * (count // CHUNK)


def expected(path: Path, bits: int | None, group: int) -> tuple[list[int], list[mx.array]]:
    """Return mlx-lm's result in one process."""
    model, _ = load_model(path)
    how: dict[str, Any] = {"kv_bits": bits, "kv_group_size": group, "quantized_kv_start": 0}
    pairs = list(generate_step(mx.array(PROMPT), model, max_tokens=ANSWER, prefill_step_size=CHUNK, **how))
    return [token for token, _ in pairs], [logprob for _, logprob in pairs]


def answer(ring: Ring) -> list[Any]:
    ring.send(Join(1, len(PROMPT), ALL))
    ring.prefill(1, PROMPT[:-1], chunks(len(PROMPT) - 1))
    samples = ring.go_on(1, PROMPT[-1], ANSWER)
    ring.send(Leave(1))
    return samples


@pytest.mark.parametrize("bits", chosen([4, 8], 4))
@pytest.mark.parametrize("arch", WIDE)
def test_stages_say_what_mlx_lm_says_with_quantized_caches(arch: str, bits: int, wide: Callable[[str], Path]) -> None:
    want_tokens, want = expected(wide(arch), bits, min(64, WIDE[arch]["head_dim"]))
    plain = expected(wide(arch), None, 64)[1]
    assert not all(mx.array_equal(a, b).item() for a, b in zip(want, plain, strict=True)), "else it would prove nothing"
    for stages in (1, 2, 3):
        samples = answer(quantized(wide(arch), bits, stages))
        assert tokens(samples) == want_tokens
        assert all(mx.array_equal(logprobs(s), w).item() for s, w in zip(samples, want, strict=True))


def test_a_quantized_sequence_is_saved_restored_and_trimmed(wide: Callable[[str], Path]) -> None:
    ring = quantized(wide("llama"), 8, 2)
    whole = tokens(answer(ring))
    ring.send(Join(1, len(PROMPT), ALL))
    ring.prefill(1, PROMPT[:-1], chunks(len(PROMPT) - 1))
    said = tokens(ring.go_on(1, PROMPT[-1], 4))
    ring.send(Save(1, 9))
    ring.go_on(1, 7, 3)
    ring.send(Join(2, len(PROMPT), ALL), Restore(2, 9, len(PROMPT) + 3))
    assert said + tokens(ring.go_on(2, said[-1], ANSWER - 4)) == whole
    ring.send(Join(3, len(PROMPT), ALL), Restore(3, 9, len(PROMPT) - 1))
    assert tokens(ring.go_on(3, PROMPT[-1], ANSWER)) == whole


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("arch", ["llama", "qwen3_next"])
def test_quantized_caches_stay_within_what_the_survey_charges(
    arch: str, bits: int, wide: Callable[[str], Path]
) -> None:
    context = 700
    plain, less = (read_shape(wide(arch), arch, context, kv_bits=b) for b in (0, bits))
    ring = Ring(less, wide(arch), 3, kv_bits=bits)
    ring.send(Join(1, context, ALL))
    ring.prefill(1, (7,) * context, (1, 300, 255, 100))
    for stage in ring.stages:
        charged = less.stage_cache_bytes(stage.spec.layers)
        assert stage.cache_bytes <= charged <= stage.cache_bytes * 1.5
        assert charged < plain.stage_cache_bytes(stage.spec.layers) * (0.45 if arch == "llama" else 1)


def test_a_quantized_lane_takes_one_sequence(wide: Callable[[str], Path]) -> None:
    ring = quantized(wide("llama"), 4, 1)
    for i in (1, 2):
        ring.send(Join(i, 2, ALL), step=Step(Compute.PREFILL, (i,), ((1, 2),)))
    with pytest.raises(BadFrame, match="cannot share a batch"):
        ring.send(step=Step(Compute.DECODE, (1, 2), ((3,), (4,))))
    shape = read_shape(wide("llama"), "llama", 64, kv_bits=4)
    assert (shape.batchable, shape.trimmable) == (False, True)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("llama", "heads are 8 wide.*multiple of 32"),
        ("llama_sliding", "a RotatingKVCache"),
        ("falcon_h1", "a CacheList"),
        ("mamba2", "no keys and values"),
        ("deepseek_v41", "a LayerCache"),
    ],
)
def test_models_that_cannot_be_quantized_are_refused(arch: str, words: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelUnsupported, match=words):
        read_shape(checkpoint(arch), arch, None, kv_bits=4)
    shape = read_shape(checkpoint(arch), arch, None)
    with pytest.raises(ModelUnsupported, match=words):
        open_stage(shape, checkpoint(arch), LayerRange(0, 6), 0, 1, kv_bits=4)


def test_an_attention_that_cannot_read_quantized_keys_is_refused(tmp_path: Path) -> None:
    """Latent attention takes the cached rows apart itself."""
    path = make("deepseek_v3", tmp_path, kv_lora_rank=64, qk_rope_head_dim=64)
    with pytest.raises(ModelUnsupported, match="cannot read quantized keys"):
        read_shape(path, "deepseek_v3", None, kv_bits=8)


@pytest.mark.parametrize("bits", [1, 3, 16, -4])
def test_other_numbers_of_bits_are_refused(bits: int, wide: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidOption, match="4 or 8 bits") as refused:
        read_shape(wide("llama"), "llama", None, kv_bits=bits)
    assert refused.value.field == "kv_bits"
