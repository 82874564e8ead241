"""Writes checkpoints without weights: config, index and safetensors headers of real models, with holes as data.

Such a folder can be planned but not loaded. The shapes are those that mlx-lm builds from the published configs and
quantizes. No array is evaluated, so a 235B model takes no memory, and its files take no disk space.
"""

from __future__ import annotations

import importlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

SHARD_BYTES = 5 << 30
DTYPES = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float32: "F32"}
GROUP, BITS = 64, 4

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.3-70B-Instruct-4bit": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
    "Qwen3-235B-A22B-4bit": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
    },
}  # fmt: skip
"""The published configs, reduced to what determines shapes."""


def make_headers(name: str, folder: Path) -> Path:
    """Write ``name``, quantized to 4 bits in groups of 64, into ``folder`` / ``name``."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name] | {"quantization": {"group_size": GROUP, "bits": BITS}}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    shards = _shards(_parameters(config))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _write(target / file, shard)
    where = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return target


def _parameters(config: dict[str, Any]) -> dict[str, mx.array]:
    """Return the quantized model's parameters, unevaluated."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, GROUP, BITS)
    return dict(tree_flatten(model.parameters()))


def _shards(parameters: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    shards: list[dict[str, mx.array]] = [{}]
    for name, array in parameters.items():
        if sum(a.nbytes for a in shards[-1].values()) + array.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = array
    return shards


def _write(file: Path, shard: dict[str, mx.array]) -> None:
    """Write the header, then a hole of the right length."""
    ends = list(accumulate(array.nbytes for array in shard.values()))
    entries = {
        name: {"dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": [end - array.nbytes, end]}
        for (name, array), end in zip(shard.items(), ends, strict=True)
    }
    header = json.dumps(entries | {"__metadata__": {"format": "mlx"}}).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + ends[-1])
