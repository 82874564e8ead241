"""A worker reads and holds its slice, and next to nothing else. ``ops/bench/loading.py`` shows it at gigabytes."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from architectures import architectures
from checkpoints import EXPERTS, hollow, make, mixed_quantization, split, split_experts
from cluster.model.safetensors import read_shard
from cluster.model.survey import survey
from model.ring import ALL, Ring, cuts, open_stage, tokens

LAYERS = 12
WIDE = {"num_hidden_layers": LAYERS, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256}


def bytes_read() -> int:
    """What this process has asked the kernel for so far."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def around(path: Path) -> int:
    """Bytes of a checkpoint that are no tensor's. In models of real size they vanish beside the slice."""
    headers = sum(len(read_shard(shard).header) for shard in path.glob("*.safetensors"))
    return headers + sum(file.stat().st_size for file in path.iterdir() if file.suffix != ".safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {}),
        ("llama", {"dtype": mx.bfloat16}),
        ("llama", {"dtype": mx.bfloat16, "quantize": mixed_quantization}),
        ("qwen3_moe", {"dtype": mx.bfloat16}),
        ("qwen3_moe", {"dtype": mx.bfloat16, "names": EXPERTS}),
    ],
    ids=["float32", "bfloat16", "4+8 bit", "experts", "experts unconverted"],
)
def test_a_stage_reads_and_holds_its_slice(name: str, how: dict[str, Any], stages: int, tmp_path: Path) -> None:
    path = hollow({**architectures()[name].config, **WIDE}, tmp_path, **how)
    shape = survey(path, name, None)
    for i, layers in enumerate(cuts(shape, stages)):
        gc.collect()
        mx.clear_cache()
        live, read = mx.get_active_memory(), bytes_read()
        mx.reset_peak_memory()
        stage = open_stage(shape, path, layers, i, stages)
        assert stage.weight_bytes <= bytes_read() - read <= stage.weight_bytes * 1.02 + 2 * around(path)
        assert mx.get_peak_memory() - live <= stage.weight_bytes * 1.10
        assert str(path) not in Path("/proc/self/smaps").read_text()
        stage.close()


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
    want = tokens(Ring(survey(path, "whole", None), path, 1).answer(ALL, 8))
    split_experts(path)
    split(path, 4)
    shape = survey(path, "experts", None)
    ring = Ring(shape, path, 3)
    for i, layers in enumerate(cuts(shape, 3)):
        local = tuple(f"model.layers.{n}." for n in range(layers.start, layers.end))
        shared = {w.name for w in shape.shared if any(layers.start <= layer < layers.end for layer in w.layers)}
        kept = hollowed(path, tmp_path / str(i), lambda n, a=local, b=shared: n.startswith(a) or n[:-7] in b)
        ring.stages[i] = open_stage(shape, kept, layers, i, 3)
    assert tokens(ring.answer(ALL, 8)) == want
