"""Sizes and cuts without reading a weight, compared with what stages really use."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import SLICEABLE, make, split, split_experts
from cluster.core import limits
from cluster.core.errors import InvalidOption
from cluster.core.frames import Compute, Join, Step
from cluster.core.plan import LayerRange, ModelShape
from cluster.core.request import SamplingParams
from cluster.model.model_shape import read_shape
from effort import chosen
from model.memory import settled_memory
from model.ring import Ring, tokens

Checkpoints = Callable[[str], Path]
Shapes = Callable[[str], ModelShape]


@pytest.mark.parametrize("arch", chosen(SLICEABLE, "llama_4bit", "qwen3_moe", "qwen3_next"))
def test_a_survey_reads_no_weight(arch: str, checkpoint: Checkpoints) -> None:
    path = checkpoint(arch)
    gc.collect()
    mx.reset_peak_memory()
    before = settled_memory()
    shape = read_shape(path, arch, None)
    assert mx.get_peak_memory() - before < min(shape.layer_bytes) + 4096
    assert shape.layers == 6
    assert shape.clean_cuts == (1, 2, 3, 4, 5)
    assert shape.unclean == ()
    assert min(shape.layer_bytes) > 0
    assert min(shape.cache_bytes) > 0


@pytest.mark.parametrize(
    ("arch", "context"),
    [
        *((arch, 300) for arch in SLICEABLE if arch != "qwen3_next"),
        ("qwen3_next", 140),
        ("llama_sliding", 20),
        ("falcon_h1", 300),
        ("deepseek_v41", 300),
        ("longcat_flash_ngram", 300),
    ],
)
def test_caches_stay_within_what_the_survey_charges(arch: str, context: int, checkpoint: Checkpoints) -> None:
    """The prompt comes in uneven chunks up to the last token of the context; a stage has two layers."""
    shape = read_shape(checkpoint(arch), arch, context)
    ring = Ring(shape, checkpoint(arch), 3)
    largest = [0] * 3

    def look() -> None:
        largest[:] = [max(most, stage.cache_bytes) for most, stage in zip(largest, ring.stages, strict=True)]

    ring.send(Join(1, context, SamplingParams()))
    fed = 0
    for chunk in (1, 3, context // 3, context - context // 3 - 6, 1, 1):
        ring.send(step=Step(Compute.PREFILL, (1,), ((7,) * chunk,)))
        fed += chunk
        look()
    assert fed == context
    for most, stage in zip(largest, ring.stages, strict=True):
        assert most <= shape.stage_cache_bytes(stage.spec.layers) <= most * 2.5


@pytest.mark.parametrize(("chunks", "context"), [((464, 512, 512, 512), 2000), ((511, 1, 512, 1, 512), 1537)])
def test_long_contexts_in_full_chunks_are_charged_closely(
    chunks: tuple[int, ...], context: int, checkpoint: Checkpoints
) -> None:
    shape = read_shape(checkpoint("llama_sliding"), "llama_sliding", context)
    ring = Ring(shape, checkpoint("llama_sliding"), 2)
    ring.send(Join(1, context, SamplingParams()))
    ring.prefill(1, [7] * context, chunks)
    for stage in ring.stages:
        charged = shape.stage_cache_bytes(stage.spec.layers)
        assert stage.cache_bytes <= charged <= stage.cache_bytes * 1.4


def test_a_linear_layers_state_does_not_grow(checkpoint: Checkpoints) -> None:
    short, long = (read_shape(checkpoint("qwen3_next"), "qwen3_next", n) for n in (256, 2048))
    assert short.cache_bytes[0] == long.cache_bytes[0]
    assert short.cache_bytes[1] < long.cache_bytes[1]


def test_shared_weights_name_their_layers(shape: Shapes) -> None:
    tied = {w.name: w for w in shape("llama").shared}
    assert tied["model.embed_tokens"].layers == (0, 5)
    assert tied["model.embed_tokens"].nbytes == 320 * 32 * 4
    assert tied["model.norm"].layers == (5,)
    untied = {w.name: w.layers for w in shape("llama_untied").shared}
    assert untied == {"model.embed_tokens": (0,), "lm_head": (5,), "model.norm": (5,)}
    whole = shape("llama")
    both = whole.stage_bytes(LayerRange(0, 3)) + whole.stage_bytes(LayerRange(3, 6))
    assert both == whole.stage_bytes(LayerRange(0, 6)) + tied["model.embed_tokens"].nbytes


def test_the_override_of_a_quantized_layer_is_seen(shape: Shapes) -> None:
    """One matrix of layer 1 has 8 bits, the others have 4."""
    sizes = shape("llama_4bit").layer_bytes
    assert sizes[0] == sizes[2] < sizes[1]
    assert sizes[1] - sizes[0] == 64 * 64 * 4 // 8


@pytest.mark.parametrize(("asked", "got"), [(None, 2048), (100, 100), (2048, 2048)])
def test_the_context_is_what_was_asked_within_the_models_limit(
    asked: int | None, got: int, checkpoint: Checkpoints
) -> None:
    assert read_shape(checkpoint("llama"), "llama", asked).max_context == got


def test_the_context_defaults_to_ours_where_the_model_allows_more(tmp_path: Path) -> None:
    path = make("llama", tmp_path, max_position_embeddings=100_000)
    assert read_shape(path, "llama", None).max_context == 4096
    assert read_shape(path, "llama", 100_000).max_context == 100_000
    assert read_shape(path, "llama", None, default_context=50_000).max_context == 50_000
    assert read_shape(path, "llama", None, default_context=200_000).max_context == 100_000


@pytest.mark.parametrize("asked", [2049, 0, -1])
def test_a_context_that_cannot_be_is_refused(asked: int, checkpoint: Checkpoints) -> None:
    with pytest.raises(InvalidOption, match=f"{asked}.*(2048|at least 1)"):
        read_shape(checkpoint("llama"), "llama", asked)


def test_an_unconverted_checkpoint_in_shards_says_the_same(tmp_path: Path, checkpoint: Checkpoints) -> None:
    """Experts one by one and layers over several files, as published: mlx-lm stacks them when it loads."""
    path = make("qwen3_moe", tmp_path, layers=6)
    split_experts(path)
    split(path, 4)
    shape = read_shape(path, "qwen3_moe", None)
    same = read_shape(checkpoint("qwen3_moe"), "qwen3_moe", None)
    assert (shape.layer_bytes, shape.shared) == (same.layer_bytes, same.shared)
    said = tokens(Ring(shape, path, 3).answer(SamplingParams(), 8))
    assert said == tokens(Ring(same, checkpoint("qwen3_moe"), 3).answer(SamplingParams(), 8))


def test_surveys_agree_across_calls(checkpoint: Checkpoints, shape: Shapes) -> None:
    assert read_shape(checkpoint("qwen3_moe"), "qwen3_moe", None) == shape("qwen3_moe")


def test_longer_chunks_are_sized_for_where_caches_hardly_grow(checkpoint: Checkpoints) -> None:
    """A sliding window holds a whole last chunk: here 2,048 tokens where it would hold 15."""
    assert read_shape(checkpoint("llama"), "llama", None).max_chunk == 2048
    assert read_shape(checkpoint("llama_sliding"), "llama_sliding", None).max_chunk == 512
    asked, usual = (
        read_shape(checkpoint("llama_sliding"), "llama_sliding", None, prefill_chunk=n) for n in (1500, 512)
    )
    assert asked.max_chunk == 1500
    assert sum(asked.cache_bytes) > sum(usual.cache_bytes)


def test_a_longer_chunk_that_was_asked_for_is_charged(checkpoint: Checkpoints) -> None:
    path, context = checkpoint("llama_sliding"), 2000
    shape = read_shape(path, "llama_sliding", context, prefill_chunk=1500)
    ring = Ring(shape, path, 2)
    ring.send(Join(1, context, SamplingParams()))
    ring.prefill(1, [7] * context, (500, 1500))
    for stage in ring.stages:
        charged = shape.stage_cache_bytes(stage.spec.layers)
        assert stage.cache_bytes <= charged <= stage.cache_bytes * 1.4


def test_a_chunk_whose_tensors_fill_more_than_a_frame_is_refused(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_FRAME_BYTES", limits.MAX_FRAME_HEADER_BYTES + 600 * 32 * 4)
    with pytest.raises(InvalidOption, match=r"invalid prefill chunk of 601 tokens: .* at most 600 at once"):
        read_shape(checkpoint("llama"), "llama", None, prefill_chunk=601)
    assert read_shape(checkpoint("llama"), "llama", None, prefill_chunk=600).max_chunk == 600
    assert read_shape(checkpoint("llama"), "llama", None).max_chunk == 512
