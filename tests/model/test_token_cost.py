"""Bytes and operations of one token, measured on real architectures and compared with their configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import make
from cluster.core.plan import ModelShape
from cluster.model.model_shape import read_shape


def surveyed(arch: str, folder: Path) -> ModelShape:
    return read_shape(make(arch, folder / arch), arch, None)


def test_a_dense_model_reads_all_of_its_layers_and_a_row_of_its_embedding(tmp_path: Path) -> None:
    shape = surveyed("llama", tmp_path)
    assert shape.active_bytes == shape.layer_bytes
    assert shape.expert_bytes == (0,) * 4
    (embedding,) = (w for w in shape.shared if w.lookup_bytes is not None)
    assert (embedding.name, embedding.head) == ("model.embed_tokens", True)
    assert embedding.lookup_bytes == shape.boundary_bytes[1] == 32 * 4
    assert shape.boundary_bytes[0] == 0


def test_an_untied_embedding_is_no_head(tmp_path: Path) -> None:
    shape = surveyed("llama_4bit", tmp_path)
    by_name = {w.name: w for w in shape.shared}
    assert by_name["model.embed_tokens"].head is False
    assert by_name["lm_head"].lookup_bytes is None


@pytest.mark.parametrize(("arch", "experts", "chosen"), [("qwen3_moe", 4, 2), ("gpt_oss", 4, 2)])
def test_of_stacked_experts_a_token_reads_those_it_is_sent_to(
    tmp_path: Path, arch: str, experts: int, chosen: int
) -> None:
    shape = surveyed(arch, tmp_path)
    sparse = [i for i, n in enumerate(shape.expert_bytes) if n]
    assert sparse
    for i in sparse:
        idle = shape.expert_bytes[i] * (experts - chosen) // experts
        assert shape.active_bytes[i] == shape.layer_bytes[i] - idle
    assert all(shape.flops)


def test_operations_do_not_depend_on_how_many_bits_a_weight_has(tmp_path: Path) -> None:
    wide = {"hidden_size": 64}
    plain = read_shape(make("llama", tmp_path / "plain", **wide), "plain", None)
    packed = read_shape(make("llama_4bit", tmp_path / "packed"), "packed", None)
    assert plain.layer_bytes[0] > packed.layer_bytes[0]
    assert packed.flops[0] == packed.flops[1], "layer 1 has one matrix in 8 bits"
