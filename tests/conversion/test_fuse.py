"""Fused models: tensors and config are those of ``mlx_lm.fuse``, and tokens those of the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import dequantize_model, load_model, save_config, save_model

import checkpoints
from adapters import make_adapter
from cluster.cli.main import main
from cluster.conversion.converter import convert_checkpoint
from cluster.core.adapter import AdapterRef
from cluster.core.errors import ModelDiffers
from cluster.model.adapter_files import open_adapter
from cluster.model.weight_conversion import Conversion
from integration.reference import greedy

PROMPT = tuple(range(5, 25))


def fused_by_mlx_lm(model: Path, adapter: Path, target: Path, dequantize: bool) -> Path:
    """What ``mlx_lm.fuse`` does between loading and saving."""
    loaded, config = load_model(model)
    load_adapters(loaded, str(adapter))
    loaded.eval()
    layers = [(n, m.fuse(dequantize=dequantize)) for n, m in loaded.named_modules() if hasattr(m, "fuse")]
    loaded.update_modules(tree_unflatten(layers))
    if dequantize:
        loaded = dequantize_model(loaded)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    save_model(target, loaded)
    save_config(config, target / "config.json")
    return target


@pytest.mark.parametrize(
    ("arch", "kind", "dequantize"),
    [
        ("llama", "lora", False),
        ("llama_4bit", "lora", False),
        ("llama_4bit", "lora", True),
        ("qwen3_moe", "lora", False),
        ("llama", "dora", False),
    ],
)
def test_tensors_and_config_are_those_of_mlx_lm(arch: str, kind: str, dequantize: bool, tmp_path: Path) -> None:
    model = checkpoints.make(arch, tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter", 1, kind=kind)
    arguments = ["--model", str(model), "--adapter-path", str(adapter), "--save-path", str(tmp_path / "fused")]
    with pytest.raises(SystemExit) as ended:
        main(["fuse", *arguments, *(["--dequantize"] if dequantize else [])])
    assert ended.value.code == 0
    theirs = fused_by_mlx_lm(model, adapter, tmp_path / "theirs", dequantize)
    found, expected = (mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "fused", theirs))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "fused", theirs)]
    assert configs[0] == configs[1]
    if arch == "llama" and kind == "lora":
        assert greedy(tmp_path / "fused", PROMPT, 8) == greedy(model, PROMPT, 8, adapter=adapter)


def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model")
    adapter = make_adapter(checkpoints.make("llama", tmp_path / "wide", intermediate_size=96), tmp_path / "adapter", 1)
    ref = AdapterRef("adapter", str(adapter), open_adapter(adapter).fingerprint)
    with pytest.raises(ModelDiffers, match="is not for this model"):
        convert_checkpoint(model, tmp_path / "fused", Conversion(adapter=ref), lambda _: None)
    assert not (tmp_path / "fused").exists()
