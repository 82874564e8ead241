"""A stage needs exactly the tensors that the map names: all others may be not-a-number."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import PECULIAR, SLICEABLE, make, split, split_experts
from cluster.core.plan import LayerRange, ModelShape
from cluster.model.checkpoint import open_checkpoint
from cluster.model.model_shape import read_shape
from cluster.model.tensor_map import tensor_map
from effort import chosen
from model.ring import ALL as SAMPLING
from model.ring import PROMPT, Ring, cuts, edited, open_stage, reference, tokens

ANSWER = 6


def spoil(folder: Path, kept: frozenset[str]) -> None:
    """Overwrite every other tensor with ones in every bit: not-a-number, or nonsense."""
    for tensor in open_checkpoint(folder).tensors.values():
        if tensor.name not in kept:
            with (folder / tensor.file).open("r+b") as file:
                file.seek(tensor.offset)
                file.write(b"\xff" * tensor.nbytes)


def spoiled_ring(shape: ModelShape, whole: Path, folder: Path, stages: int) -> Ring:
    """Each stage reads a copy of which only its own tensors are right."""
    mapped = tensor_map(whole, shape.shared)
    ring = Ring(shape, whole, 1)
    parts = cuts(shape, stages)
    ring.stages = []
    for i, layers in enumerate(parts):
        copy = shutil.copytree(whole, folder / str(i))
        spoil(copy, mapped.of(layers))
        ring.stages.append(open_stage(edited(shape, copy), copy, layers, i, stages))
    return ring


@pytest.mark.parametrize(
    "arch", chosen([*SLICEABLE, *PECULIAR], "llama_4bit", "qwen3_moe", "qwen3_next", "rwkv7", "kimi_k3", "gemma4_text")
)
def test_all_other_tensors_may_be_wrong(
    arch: str, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape], tmp_path: Path
) -> None:
    ring = spoiled_ring(shape(arch), checkpoint(arch), tmp_path, 2)
    assert tokens(ring.answer(SAMPLING, ANSWER)) == reference(checkpoint(arch), ANSWER)[0]


def test_tensors_that_mlx_lm_stacks_are_traced_to_their_parts(tmp_path: Path) -> None:
    folder = make("qwen3_moe", tmp_path / "moe")
    split_experts(folder)
    split(folder, 3)
    shape = read_shape(folder, "moe", None)
    mapped = tensor_map(folder, shape.shared)
    assert any(".experts.3." in name for name in mapped.layers[0])
    assert mapped.of(LayerRange(0, shape.layers)) == open_checkpoint(folder).tensors.keys()
    ring = spoiled_ring(shape, folder, tmp_path / "copies", 3)
    assert tokens(ring.answer(SAMPLING, ANSWER, PROMPT)) == reference(folder, ANSWER)[0]
