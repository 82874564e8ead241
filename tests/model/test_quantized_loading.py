"""Weights that are quantized while they are loaded: the model is the one that a conversion writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import make, split_experts
from cluster.conversion.converter import convert_checkpoint
from cluster.core.errors import InvalidOption, StaleEpoch
from cluster.core.plan import LayerRange, StageSpec
from cluster.core.quantization import Quantization
from cluster.model.model_shape import read_shape
from cluster.model.weight_conversion import Conversion
from model.ring import ALL, Ring, open_stage, tokens

WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}


@pytest.fixture(scope="module", params=["llama", "llama_untied", "qwen3_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as its makers publish it: each expert is a tensor."""
    folder = make(request.param, tmp_path_factory.mktemp("published") / request.param, **WIDE)
    if request.param == "qwen3_moe":
        split_experts(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_is_quantized_while_loading_is_the_converted_one(source: Path, bits: int, tmp_path: Path) -> None:
    """The same plan figures, and the same log-probabilities of all tokens, bit for bit."""
    convert_checkpoint(source, tmp_path / "converted", Conversion(Quantization(bits, 64)), lambda _: None)
    converted = read_shape(tmp_path / "converted", source.name, None)
    shape = read_shape(source, source.name, None, weight_bits=bits)
    assert replace(shape, model=converted.model) == converted
    expected = Ring(converted, tmp_path / "converted", 1).answer(ALL, 8)
    found = Ring(shape, source, 3, weight_bits=bits).answer(ALL, 8)
    assert tokens(found) == tokens(expected)
    assert found == expected


def test_a_stage_with_other_bits_is_loaded_again(source: Path) -> None:
    shape = read_shape(source, source.name, None, weight_bits=4)
    stage = open_stage(shape, source, LayerRange(0, 2), 0, 2, weight_bits=4)
    spec = StageSpec(2, 0, 2, shape.model, LayerRange(0, 2), shape.max_context, weight_bits=4)
    with pytest.raises(StaleEpoch):
        stage.begin_epoch(replace(spec, weight_bits=8))
    stage.begin_epoch(spec)
    stage.close()


def test_weights_that_mlx_lm_dequantizes_are_quantized(tmp_path: Path) -> None:
    """A config of 8-bit floats stays in the model's config after mlx-lm has opened it."""
    source = make("llama", tmp_path / "floats", **WIDE, quantization_config={"quant_method": "fp8"})
    plain, quantized = (read_shape(source, "floats", None, weight_bits=bits) for bits in (0, 4))
    assert sum(quantized.layer_bytes) < 0.3 * sum(plain.layer_bytes)


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    quantized = make("llama_4bit", tmp_path / "quantized")
    with pytest.raises(InvalidOption, match="the model is quantized already"):
        read_shape(quantized, "quantized", None, weight_bits=4)
    plain = make("llama", tmp_path / "plain")
    with pytest.raises(InvalidOption, match="mode affine has no quantization with 7 bits"):
        read_shape(plain, "plain", None, weight_bits=7)
