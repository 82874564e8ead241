"""Adapters of mlx-lm's format for tiny models, with random values so that they change tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

LEAVES = ("lora_a", "lora_b", "m")


def make_adapter(
    model: Path, folder: Path, seed: int, num_layers: int = -1, kind: str = "lora", rank: int = 4, **parameters: Any
) -> Path:
    """Write an adapter as ``mlx_lm.lora`` does, with random values in all of its tensors; return its folder."""
    wrapped, _ = load_model(model, lazy=True)
    config = {"rank": rank, "scale": 4.0, "dropout": 0.5, **parameters}
    linear_to_lora_layers(wrapped, num_layers, config, use_dora=kind == "dora")
    tensors = {n: a for n, a in tree_flatten(wrapped.parameters()) if n.rpartition(".")[2] in LEAVES}
    keys = mx.random.split(mx.random.key(seed), len(tensors))
    made = {n: _random(n, a, key) for (n, a), key in zip(sorted(tensors.items()), keys, strict=True)}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), made)
    written = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": config, "model": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=1))
    return folder


def _random(name: str, array: mx.array, key: mx.array) -> mx.array:
    if name.endswith(".m"):  # the norms of the rows, of the right size
        return array * (1 + 0.1 * mx.random.normal(array.shape, key=key))
    return 0.3 * mx.random.normal(array.shape, key=key)
