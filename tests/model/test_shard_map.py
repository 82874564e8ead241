"""The rank of a group reads its part of the files and nothing else, and that part is the one that mlx-lm cuts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from architectures import architectures, divisible
from checkpoints import EXPERTS, hollow, make, mixed_quantization, split, split_experts, write
from cluster.core.errors import BadCheckpoint, MacpipeError, ModelUnsupported, NoPlan
from cluster.core.plan import LayerRange, StageSpec
from cluster.model.checkpoint import model_ref, open_checkpoint
from cluster.model.loading import load_slice
from cluster.model.module_tree import Module, named_modules, parameters
from cluster.model.part_reader import PartReader
from cluster.model.safetensors import TensorInfo
from cluster.model.shard_map import TensorPart, TensorSource, map_parts, record_sources
from cluster.model.sharding import Seat, require_shardable, shard_model
from cluster.model.skeleton import open_skeleton
from effort import chosen
from model.ring import nothing
from model.test_loading import around, samples

SHARDED = [
    *("llama", "ministral3", "qwen2", "qwen3", "exaone_moe", "glm4_moe", "gpt_oss", "minimax", "minimax_m3_vl"),
    *("qwen3_moe", "solar_open", "step3p5", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41"),
    *("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "longcat_flash_ngram", "mistral4", "kimi_k3", "kimi_k25"),
    *("qwen3_5", "qwen3_5_moe", "prism_hadamard_qwen35"),
]
"""The served modules that mlx-lm can shard; some use another one's code."""


def mapped(path: Path, seat: Seat) -> tuple[dict[str, TensorPart], Module]:
    """Return the parts of a whole checkpoint, and the model as mlx-lm itself shards it."""
    with record_sources(open_checkpoint(path).tensors) as find_sources:
        model = open_skeleton(path)
    parts = map_parts(model, find_sources(model), seat, lambda _: True)
    shard_model(model, seat)
    return parts, model


def require_right(path: Path, size: int) -> set[str]:
    """Every part is, byte for byte, what sharding makes of the whole tensors. Return the parts' paths."""
    whole = parameters(open_skeleton(path))
    for rank in range(size):
        parts, model = mapped(path, Seat(rank, size))
        sharded = parameters(model)
        assert {name for name in sharded if sharded[name].shape != whole[name].shape} <= parts.keys()
        with PartReader(path) as reader:
            for name, part in parts.items():
                found = reader.read(part)
                assert (found.shape, found.dtype) == (sharded[name].shape, sharded[name].dtype)
                assert mx.array_equal(found, mx.contiguous(sharded[name])).item(), name
    return set(parts)


def test_the_list_is_that_of_mlx_lm() -> None:
    """A module that learns to shard fails here: add it to the list, and so to what is compared with mlx-lm."""
    able = {
        name for name in architectures() if hasattr(importlib.import_module(f"mlx_lm.models.{name}").Model, "shard")
    }
    assert able == set(SHARDED)


@pytest.mark.parametrize("name", chosen(SHARDED, "llama", "gpt_oss", "deepseek_v3", "qwen3_5_moe"))
@pytest.mark.parametrize("bits", ["float32", "4+8 bit"])
def test_each_part_is_what_mlx_lm_cuts(name: str, bits: str, tmp_path: Path) -> None:
    if bits != "float32" and "quantization" in architectures()[name].config:
        pytest.skip("it is packed by its makers")
    how = {} if bits == "float32" else {"quantize": mixed_quantization}
    assert require_right(write(divisible(architectures()[name].config, 2), tmp_path, **how), 2)


def test_more_ranks_and_repeated_heads(tmp_path: Path) -> None:
    """Four ranks and two heads of keys: mlx-lm repeats these for qwen3_5, so two ranks read the same rows."""
    config = divisible(architectures()["qwen3_5"].config, 4)
    config["text_config"]["num_key_value_heads"] = 2
    path = write(config, tmp_path)
    assert require_right(path, 4)
    keys = next(name for name in mapped(path, Seat(0, 4))[0] if name.endswith("self_attn.k_proj.weight"))
    rows = [mapped(path, Seat(rank, 4))[0][keys].axes[0] for rank in range(4)]
    assert rows[0] == rows[1] != rows[2] == rows[3]


def test_stacked_experts_are_read_from_their_own_tensors(tmp_path: Path) -> None:
    path = make("qwen3_moe", tmp_path, moe_intermediate_size=32)
    split_experts(path)
    split(path, 3)
    stacks = {name for name in require_right(path, 2) if ".switch_mlp." in name}
    assert len(stacks) == 3 * 3  # all but the dense layer's


REFUSED: dict[str, tuple[str, dict[str, Any], int, type[MacpipeError], str]] = {
    "no shard": ("mamba2", {}, 2, ModelUnsupported, "mlx-lm cannot share the layers of mamba2 models"),
    "width": ("llama", {}, 3, NoPlan, "Cannot shard the output of size 32 across 3"),
    "heads": ("llama", {"head_dim": 12}, 3, NoPlan, "n_heads is 4"),
    "heads of keys": ("llama", {}, 4, NoPlan, "n_kv_heads is 2"),
    "quantization groups": ("llama_4bit", {"intermediate_size": 96}, 2, NoPlan, "2 Macs cannot share"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_divide_is_refused(case: str, tmp_path: Path) -> None:
    """From the headers alone, with the number at fault; the model is as it was."""
    arch, more, size, error, words = REFUSED[case]
    path = make(arch, tmp_path, **more)
    model = open_skeleton(path)
    before, arrays = [dict(vars(module)) for _, module in named_modules(model)], parameters(model)
    with pytest.raises(error, match=words):
        require_shardable(model, size)
    assert [dict(vars(module)) for _, module in named_modules(model)] == before
    assert all(array is arrays[name] for name, array in parameters(model).items())


def test_arithmetic_is_no_selection() -> None:
    """A part that was computed with is not taken for a part of the tensor: added to, divided, transposed, turned."""

    class Peculiar(Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            for name in ("plain", "added", "divided", "turned", "flat", "mixed"):
                self[name] = mx.zeros((8, 8))

        def shard(self, group: Seat) -> None:
            half = slice(4 * group.rank(), 4 * group.rank() + 4)
            self["plain"] = self["plain"][half]
            self["added"] = self["added"][half] + 1
            self["divided"] = self["divided"][half] / 2
            self["turned"] = self["turned"].T[half]
            self["flat"] = self["flat"][half].reshape(-1)
            self["mixed"] = mx.concatenate([self["mixed"][:4, :4], self["mixed"][4:, 4:]])

    model = Peculiar()
    sources = {name: TensorSource((TensorInfo(name, "F32", (8, 8), "f", 256, 0),)) for name in parameters(model)}
    assert {name: part.axes for name, part in map_parts(model, sources, Seat(1, 2), lambda _: True).items()} == {
        "plain": (((4, 8),), ((0, 8),))
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_a_file_that_becomes_shorter_is_an_error(axis: int, tmp_path: Path) -> None:
    """Whatever is read of it: rows in one piece, or a piece of each row."""
    path = make("llama", tmp_path, hidden_size=512, num_hidden_layers=1)
    parts, _ = mapped(path, Seat(1, 2))
    name = f"model.layers.0.mlp.{('up', 'down')[axis]}_proj.weight"
    (tensor,) = parts[name].source.tensors
    assert parts[name].axes[axis] == ((tensor.shape[axis] // 2, tensor.shape[axis]),)
    with (path / tensor.file).open("r+b") as file:
        file.truncate(tensor.end - 1)
    with PartReader(path) as reader, pytest.raises(BadCheckpoint, match="became shorter"):
        reader.read(parts[name])
    (path / tensor.file).unlink()
    with PartReader(path) as reader, pytest.raises(BadCheckpoint, match="No such file"):
        reader.read(parts[name])


WIDE = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 16384, "moe_intermediate_size": 1024}
WIDE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}


@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize("kind", ["4+8 bit", pytest.param("experts", marks=pytest.mark.long)])
def test_a_rank_reads_and_holds_its_part(kind: str, tmp_path: Path) -> None:
    """Both stages of two groups of two, in a process of their own, since the kernel counts a whole process's reads."""
    if kind == "experts":
        path = hollow({**architectures()["qwen3_moe"].config, **WIDE}, tmp_path, dtype=mx.bfloat16, names=EXPERTS)
    else:
        config = {**architectures()["llama"].config, **WIDE}
        path = hollow(config, tmp_path, dtype=mx.bfloat16, quantize=mixed_quantization)
    program = Path(__file__).with_name("loads.py")
    command = [sys.executable, program, path, "0", "2", "--ranks", "2"]
    loads = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [(load["stage"], load["rank"]) for load in loads] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for load in loads:
        assert load["weights"] < 0.6 * load["stored"]
        assert load["weights"] <= load["read"] <= load["weights"] * 1.05 + 2 * around(path) + samples(path)
        assert load["peak"] <= load["weights"] * 1.15
        assert not load["mapped"]


def test_the_rest_of_the_files_may_be_wrong(tmp_path: Path) -> None:
    """A rank's arrays do not change if all that it must not read is not-a-number."""
    path = write(divisible(architectures()["qwen3_moe"].config, 2), tmp_path / "m", quantize=mixed_quantization)
    layers, seat = LayerRange(0, 2), Seat(1, 2)
    want = arrays_of(path, layers, seat)
    keep_only(path, layers, seat)
    for found, expected in zip(arrays_of(path, layers, seat), want, strict=True):
        assert mx.array_equal(found, expected).item()


def arrays_of(path: Path, layers: LayerRange, seat: Seat) -> list[mx.array]:
    part = load_slice(StageSpec(1, 0, 2, model_ref(str(path)), layers, 256), path, nothing, seat)[0]
    return [*part.outside_arrays(), *(a for i in range(layers.start, layers.end) for a in part.layer_arrays(i))]


def keep_only(path: Path, layers: LayerRange, seat: Seat) -> None:
    """Overwrite everything that the seat's part of the first layers does not have."""
    parts, _ = mapped(path, seat)
    local = (*(f"model.layers.{i}." for i in range(layers.start, layers.end)), "model.embed_tokens.")
    for tensor in open_checkpoint(path).tensors.values():
        if tensor.name.startswith(local) and tensor.name not in parts:
            continue  # all ranks have it
        with (path / tensor.file).open("r+b") as file:
            file.seek(tensor.offset)
            whole = np.frombuffer(file.read(tensor.nbytes), np.uint8).reshape(*tensor.shape, -1)
            spoiled = np.full_like(whole, 255)
            if tensor.name.startswith(local):
                kept = np.ix_(*(np.concatenate([np.arange(*run) for run in runs]) for runs in parts[tensor.name].axes))
                spoiled[kept] = whole[kept]
            file.seek(tensor.offset)
            file.write(spoiled.tobytes())
