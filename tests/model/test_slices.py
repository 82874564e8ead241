"""A model cut into stages produces what mlx-lm does in one process, bit for bit."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import PECULIAR, SLICEABLE, make, poison
from cluster.core.errors import ModelDiffers, ModelUnsupported, NoPlan, StageFailed
from cluster.core.frames import Compute, Frame, Join, Leave, PromptScoring, Step
from cluster.core.plan import LayerRange, ModelRef, ModelShape, StageSpec
from cluster.core.request import SamplingParams
from cluster.model.model_shape import read_shape
from cluster.model.skeleton import open_skeleton
from cluster.model.slice import ModelSlice
from cluster.model.stage import load_stage
from cluster.model.trace import trace
from effort import chosen
from model.memory import settled_memory
from model.ring import ALL, PROMPT, Ring, cuts, edited, logprobs, nothing, open_stage, reference, tokens

Checkpoints = Callable[[str], Path]
Shapes = Callable[[str], ModelShape]
ANSWER = 12


@pytest.fixture(scope="session")
def expected(checkpoint: Checkpoints) -> Callable[[str], tuple[list[int], list[mx.array]]]:
    made: dict[str, tuple[list[int], list[mx.array]]] = {}
    return lambda arch: made.setdefault(arch, made.get(arch) or reference(checkpoint(arch), ANSWER))


@pytest.mark.parametrize(
    ("arch", "stages"),
    chosen([*product(SLICEABLE, (1, 2, 3, 4)), *product(PECULIAR, (2, 3))], *product((*SLICEABLE, *PECULIAR), (3,))),
)
def test_stages_say_what_mlx_lm_says(
    arch: str,
    stages: int,
    checkpoint: Checkpoints,
    shape: Shapes,
    expected: Callable[[str], tuple[list[int], list[mx.array]]],
) -> None:
    if stages > len(shape(arch).clean_cuts) + 1:
        pytest.skip("this one has fewer clean cuts")
    want_tokens, want_logprobs = expected(arch)
    samples = Ring(shape(arch), checkpoint(arch), stages).answer(ALL, ANSWER)
    assert tokens(samples) == want_tokens
    assert len(set(want_tokens)) > 3 or arch == "gemma4_text", "a model that repeats itself would prove little"
    for sample, want in zip(samples, want_logprobs, strict=True):
        assert mx.array_equal(logprobs(sample), want).item()
        assert sample.logprob == want[sample.token].item()
    assert [sample.position for sample in samples] == [len(PROMPT) + i for i in range(ANSWER)]


@pytest.mark.parametrize(
    "arch", chosen([*SLICEABLE, "hunyuan", "gemma4_text"], "llama_4bit", "qwen3_moe", "qwen3_next", "gemma4_text")
)
def test_a_stage_weighs_what_the_survey_says(arch: str, checkpoint: Checkpoints, shape: Shapes) -> None:
    for layers in cuts(shape(arch), min(3, len(shape(arch).clean_cuts) + 1)):
        gc.collect()
        before = settled_memory()
        stage = open_stage(shape(arch), checkpoint(arch), layers, 0, 1)
        grown = mx.get_active_memory() - before
        assert stage.weight_bytes == shape(arch).stage_bytes(layers)
        assert stage.weight_bytes <= grown <= stage.weight_bytes * 1.1 + 8192
        stage.close()
        assert mx.get_active_memory() - before < 8192


def test_loading_never_holds_the_tensors_of_others(tmp_path: Path) -> None:
    path = make("llama", tmp_path, layers=12, intermediate_size=4096)
    shape = read_shape(path, "llama", None)
    gc.collect()
    before = settled_memory()
    mx.reset_peak_memory()
    stage = open_stage(shape, path, LayerRange(4, 6), 1, 3)
    assert mx.get_peak_memory() - before < stage.weight_bytes * 1.1
    assert stage.weight_bytes < sum(shape.layer_bytes) / 5


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gemma3_text", "qwen3_next"])
def test_only_a_stages_own_tensors_are_read(
    arch: str, tmp_path: Path, expected: Callable[[str], tuple[list[int], list[mx.array]]]
) -> None:
    """Each stage is loaded from a copy in which every other layer is not-a-number."""
    sound = make(arch, tmp_path / "sound", layers=6)
    shape = read_shape(sound, arch, None)
    ring = Ring(shape, sound, 3)
    for i, layers in enumerate(cuts(shape, 3)):
        copy = shutil.copytree(sound, tmp_path / str(i))
        own = [f".layers.{n}." for n in range(layers.start, layers.end)]
        poison(copy, lambda name, own=own: ".layers." in name and not any(part in name for part in own))
        ring.stages[i] = open_stage(edited(shape, copy), copy, layers, i, 3)
    assert tokens(ring.answer(ALL, ANSWER)) == expected(arch)[0]


def test_a_poisoned_layer_of_ones_own_is_noticed(tmp_path: Path) -> None:
    """The other side of the test above: not-a-number in a tensor that is read must not become a token."""
    shape = read_shape(make("llama", tmp_path, layers=4), "llama", None)
    poison(tmp_path, lambda name: ".layers.2." in name)
    ring = Ring(edited(shape, tmp_path), tmp_path, 2)
    with pytest.raises(StageFailed, match="not finite"):
        ring.answer(ALL, 1)


def test_progress_is_told_layer_by_layer(checkpoint: Checkpoints, shape: Shapes) -> None:
    told: list[tuple[int, int]] = []
    spec = StageSpec(1, 0, 2, shape("llama").model, LayerRange(0, 4), 100)
    stage = load_stage(spec, checkpoint("llama"), lambda done, total: told.append((done, total)))
    assert told[0] == (0, stage.weight_bytes)
    assert told[-1] == (stage.weight_bytes, stage.weight_bytes)
    assert len(told) >= 1 + 4
    assert told == sorted(told)


def test_a_looped_model_is_refused(tmp_path: Path) -> None:
    path = make("looped", tmp_path)
    with pytest.raises(ModelUnsupported, match=r"iquestloopcoder.*looped"):
        read_shape(path, "looped", None)


def test_another_copy_of_the_model_is_refused(tmp_path: Path, shape: Shapes) -> None:
    other = make("llama", tmp_path, layers=6, rope_theta=5000.0)
    with pytest.raises(ModelDiffers, match="differ from the coordinator"):
        load_stage(StageSpec(1, 0, 1, shape("llama").model, LayerRange(0, 6), 100), other, nothing)


def test_a_cut_that_is_not_clean_is_refused_with_its_reason(checkpoint: Checkpoints, shape: Shapes) -> None:
    """The last layers of Gemma 4 read the keys of earlier ones."""
    assert shape("gemma4_text").clean_cuts == (1, 2)
    reasons = dict(shape("gemma4_text").unclean)
    assert set(reasons) == {3, 4, 5}
    spec = StageSpec(1, 0, 2, shape("gemma4_text").model, LayerRange(0, 5), 100)
    with pytest.raises(NoPlan, match=r"before layer 5: layers \[0, 1, 2, 3\] feed later layers"):
        load_stage(spec, checkpoint("gemma4_text"), nothing)


@pytest.mark.parametrize(("arch", "crossing"), [("llama", 1), ("rwkv7", 2), ("hunyuan", 3), ("kimi_k3", 3)])
def test_as_many_arrays_cross_a_cut_as_later_layers_need(
    arch: str, crossing: int, checkpoint: Checkpoints, shape: Shapes
) -> None:
    stage = open_stage(shape(arch), checkpoint(arch), LayerRange(0, 1), 0, 2)
    out = stage.step(Frame(1, 0, 0, (Join(1, 2, ALL),), Step(Compute.PREFILL, (1,), ((1, 2),))))
    assert len(out.tensors) == crossing


def test_layers_that_are_not_there_are_refused(checkpoint: Checkpoints, shape: Shapes) -> None:
    spec = StageSpec(1, 0, 1, shape("llama").model, LayerRange(3, 9), 100)
    with pytest.raises(NoPlan, match="only 6"):
        load_stage(spec, checkpoint("llama"), nothing)


def test_prefill_leaves_the_head_alone(tmp_path: Path) -> None:
    """A prefill's memory has no room for the logits of its positions, unless it reports their probabilities."""
    shape = read_shape(make("llama_untied", tmp_path, vocab_size=8192), "llama_untied", None)
    ring = Ring(shape, tmp_path, 1)
    row = tuple(i % 250 for i in range(200))
    logits_bytes = len(row) * 8192 * 4

    def peak(scoring: PromptScoring | None) -> int:
        ring.send(Join(1, 200, SamplingParams()))
        mx.reset_peak_memory()
        before = settled_memory()
        ring.send(step=Step(Compute.PREFILL, (1,), (row,), scoring))
        grown = mx.get_peak_memory() - before
        ring.send(Leave(1))
        return grown

    assert peak(None) < logits_bytes / 2
    assert peak(PromptScoring(0, (*row[1:], 1), 0)) > logits_bytes


def test_a_module_that_layers_share_keeps_its_arrays(checkpoint: Checkpoints) -> None:
    """Some models give every layer one and the same rotary embedding; dropping a ghost's must not drop ours."""
    model = open_skeleton(checkpoint("llama"))
    shared = model.layers[0].self_attn.rope
    shared["_freqs"] = mx.arange(4)
    for layer in model.layers:
        layer.self_attn.rope = shared
    part = ModelSlice(model, trace(model), LayerRange(2, 4))
    assert "_freqs" in model.layers[3].self_attn.rope
    assert "weight" not in model.layers[0].self_attn.q_proj
    assert "weight" not in model.layers[5].self_attn.q_proj
    assert len(part.layer_arrays(3)) == 9 + 1


def test_model_refs_carry_the_fingerprint(checkpoint: Checkpoints, shape: Shapes) -> None:
    assert shape("llama").model == ModelRef("llama", str(checkpoint("llama")), shape("llama").model.fingerprint)
    step = Step(Compute.PREFILL, (1,), ((1, 2),))
    stage = open_stage(shape("llama"), checkpoint("llama"), LayerRange(0, 3), 0, 2)
    out = stage.step(Frame(1, 0, 0, (Join(1, 2, ALL),), step))
    assert [(t.dtype, t.shape) for t in out.tensors] == [("float32", (1, 2, 32))]
    assert (out.step, out.edits) == (step, (Join(1, 2, ALL),))
