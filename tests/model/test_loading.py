"""A worker reads and holds its slice and almost nothing else. ``ops/bench/loading.py`` shows it at gigabytes."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from architectures import architectures
from checkpoints import EXPERTS, hollow, make, mixed_quantization, split, split_experts
from cluster.core.limits import SAMPLE_BYTES
from cluster.core.request import SamplingParams
from cluster.model.model_shape import read_shape
from cluster.model.safetensors import read_shard
from effort import chosen
from model.ring import ALL, Ring, cuts, edited, open_stage, tokens

LAYERS = 12
WIDE = {"num_hidden_layers": LAYERS, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256}


def around(path: Path) -> int:
    """Return the bytes of a checkpoint outside its tensors. In real models they are negligible."""
    headers = sum(len(read_shard(shard).header) for shard in path.glob("*.safetensors"))
    return headers + sum(file.stat().st_size for file in path.iterdir() if file.suffix != ".safetensors")


def samples(path: Path) -> int:
    """Return the bytes read of every tensor to distinguish checkpoints with the same headers."""
    return sum(min(t.nbytes, SAMPLE_BYTES) for shard in path.glob("*.safetensors") for t in read_shard(shard).tensors)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("llama", {}),
    "bfloat16": ("llama", {"dtype": mx.bfloat16}),
    "4+8 bit": ("llama", {"dtype": mx.bfloat16, "quantize": mixed_quantization}),
    "experts": ("qwen3_moe", {"dtype": mx.bfloat16}),
    "experts unconverted": ("qwen3_moe", {"dtype": mx.bfloat16, "names": EXPERTS}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize("kind", chosen(MODELS, "float32", "4+8 bit", "experts unconverted"))
def test_a_stage_reads_and_holds_its_slice(kind: str, tmp_path: Path) -> None:
    """Loaded in a child process, since the kernel counts the reads of a whole process."""
    name, how = MODELS[kind]
    path = hollow({**architectures()[name].config, **WIDE}, tmp_path, **how)
    command = [sys.executable, Path(__file__).with_name("loads.py"), path, "0", "2", "3"]
    loads = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [(load["stages"], load["stage"]) for load in loads] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    for load in loads:
        assert load["weights"] <= load["read"] <= load["weights"] * 1.02 + 2 * around(path) + samples(path)
        assert load["peak"] <= load["weights"] * 1.10
        assert not load["mapped"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize("kind", ["experts unconverted", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_a_stage_that_quantizes_reads_its_slice_and_never_holds_it(kind: str, tmp_path: Path) -> None:
    """At its peak it holds the quantized slice, and two of the largest tensor or layer as they are published."""
    name, how = MODELS[kind]
    path = hollow({**architectures()[name].config, **WIDE, "num_hidden_layers": 6}, tmp_path, **how)
    plain = read_shape(path, name, None)
    largest = max(*plain.layer_bytes, *(weight.nbytes for weight in plain.shared))
    command = [sys.executable, Path(__file__).with_name("loads.py"), path, "4", "2"]
    loads = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(loads) == 2
    for load in loads:
        assert load["weights"] < 0.3 * load["stored"]
        assert load["stored"] <= load["read"] <= load["stored"] * 1.02 + 2 * around(path) + samples(path)
        assert load["peak"] <= load["weights"] + 2 * largest
        assert not load["mapped"]


def hollowed(path: Path, copy: Path, wanted: Callable[[str], bool]) -> Path:
    """A copy of the checkpoint whose shards are placeholders: whole headers, and only the wanted tensors' bytes."""
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        with (copy / file.name).open("wb") as out:
            out.write(content[:start])
            for name, entry in json.loads(content[8:start]).items():
                if name != "__metadata__" and wanted(name):
                    first, end = (start + offset for offset in entry["data_offsets"])
                    out.seek(first)
                    out.write(content[first:end])
            out.truncate(len(content))
    return copy


def test_placeholders_of_unconverted_shards_are_enough(tmp_path: Path) -> None:
    """Experts a tensor each, spread over shards, and on each worker's disk no byte but its own slice's."""
    path = make("qwen3_moe", tmp_path / "whole", layers=6)
    want = tokens(Ring(read_shape(path, "whole", None), path, 1).answer(ALL, 8))
    split_experts(path)
    split(path, 4)
    shape = read_shape(path, "experts", None)
    ring = Ring(shape, path, 3)
    for i, layers in enumerate(cuts(shape, 3)):
        local = tuple(f"model.layers.{n}." for n in range(layers.start, layers.end))
        shared = {w.name for w in shape.shared if any(layers.start <= layer < layers.end for layer in w.layers)}
        kept = hollowed(path, tmp_path / str(i), lambda n, a=local, b=shared: n.startswith(a) or n[:-7] in b)
        ring.stages[i] = open_stage(edited(shape, kept), kept, layers, i, 3)
    assert tokens(ring.answer(ALL, 8)) == want


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_loads_leave_no_objects_behind(architecture: str, tmp_path: Path) -> None:
    path = make(architecture, tmp_path)
    shape = read_shape(path, "m", 64)
    others = set(threading.enumerate())

    def load(times: int) -> int:
        """Load, answer and unload so often. Return how many objects there are then."""
        for _ in range(times):
            ring = Ring(shape, path, 1)
            ring.answer(SamplingParams(), 4)
            for stage in ring.stages:
                stage.close()
            for thread in set(threading.enumerate()) - others:
                if thread.name.startswith("grammars"):  # it reads the tokenizer
                    thread.join(30)
        gc.collect()
        return len(gc.get_objects())

    more, counts = 5, [load(2)]
    counts += [load(more) for _ in range(3)]
    grown = [after - before for before, after in itertools.pairwise(counts)]
    assert min(grown) < more, f"each load keeps an object, and not the first ones alone: {grown}"
