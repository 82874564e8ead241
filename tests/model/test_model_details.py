"""What people are told of a checkpoint, read from its headers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from cluster.core.errors import ModelNotFound
from cluster.model.checkpoint import BUNDLED
from cluster.model.model_details import read_details


def test_weights_are_counted_and_named_by_their_type() -> None:
    folder = BUNDLED / "faq"
    model, config = load_model(folder, lazy=True)
    details = read_details(folder)
    assert details.parameters == sum(array.size for _, array in tree_flatten(model.parameters()))
    assert (details.architecture, details.width) == (config["model_type"], config["hidden_size"])
    assert details.quantization in ("F16", "BF16", "F32")


def write(folder: Path, mode: str, bits: int, group_size: int, own: int | None = None) -> Path:
    """Write a checkpoint of one quantized matrix, another with groups of its own, and a norm."""
    tensors = {"norm.weight": mx.ones(128)}
    for name, size in (("model.a", group_size), ("model.b", own or group_size)):
        weight, scales, *biases = mx.quantize(mx.ones((64, 128)), size, bits, mode)
        tensors |= {f"{name}.weight": weight, f"{name}.scales": scales}
        tensors |= {f"{name}.biases": one for one in biases}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    overrides = {"model.b": {"group_size": own, "bits": bits}} if own else {}
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization": quantization | overrides}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "own", "told"),
    [("affine", 4, 64, None, "4-bit"), ("affine", 8, 32, 128, "8-bit"), ("mxfp4", 4, 32, None, "mxfp4")],
)
def test_quantized_weights_count_as_before(
    tmp_path: Path, mode: str, bits: int, group_size: int, own: int | None, told: str
) -> None:
    details = read_details(write(tmp_path, mode, bits, group_size, own))
    assert (details.parameters, details.quantization) == (2 * 64 * 128 + 128, told)
    assert (details.architecture, details.width) == ("llama", 0)


def test_a_folder_that_is_gone_has_none(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_details(tmp_path / "gone")
