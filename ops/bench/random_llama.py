"""Writes a checkpoint of random weights in a Llama's real shapes, quantized to 4 bits, layer by layer.

Each shard has one layer, made from a seed of its own. So a machine can write only the layers that it will serve, and
headers with holes in sparse files for the others. All machines still describe the same model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from cluster.model.checkpoint import resolve_model

GROUP, BITS = 64, 4
DTYPES = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float32: "F32"}
SPREAD = 0.02
"""Standard deviation of the weights, as in a trained model."""


@dataclass(frozen=True)
class Shape:
    """The fields of a Llama's config.json that set its size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int


SHAPES = {
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, 131072),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 131072),
    "small": Shape(256, 512, 4, 4, 2, 1024, 4096),
}
"""``70b`` is Llama 3.3 70B, ``8b`` is Llama 3.1 8B, ``small`` is for a CPU."""


def config(shape: Shape) -> dict[str, object]:
    return {
        "model_type": "llama",
        **asdict(shape),
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization": {"group_size": GROUP, "bits": BITS},
    }


def write(folder: Path, shape: Shape, layers: range | None = None, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """Write the checkpoint into ``folder``, with the weights of ``layers`` and those outside layers; None for all.

    The config comes last, so a folder that has one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for layer in range(-1, shape.num_hidden_layers):
        file = folder / f"model-{layer + 2:05}-of-{shape.num_hidden_layers + 1:05}.safetensors"
        arrays = dict(sorted(_outside(shape, dtype) if layer < 0 else _layer(shape, layer, dtype)))
        names.update(dict.fromkeys(arrays, file.name))
        _write_shard(file, arrays, filled=layers is None or layer < 0 or layer in layers)
        del arrays
        mx.clear_cache()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve_model("faq") / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(config(shape)))
    return folder


def _write_shard(file: Path, arrays: dict[str, mx.array], *, filled: bool) -> None:
    """Write a safetensors file: length of the header, header, tensors. Arrays are lazy until they are written."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    with file.open("wb") as out:
        out.write(len(packed).to_bytes(8, "little") + packed)
        for array in arrays.values() if filled else ():
            mx.eval(array)
            out.write(memoryview(array).cast("B"))
        out.truncate(8 + len(packed) + end)


def _layer(shape: Shape, layer: int, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    mx.random.seed(1000 + layer)
    h, head = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    kv = head * shape.num_key_value_heads
    prefix = f"model.layers.{layer}"
    for name, rows, columns in (
        ("self_attn.q_proj", h, h),
        ("self_attn.k_proj", kv, h),
        ("self_attn.v_proj", kv, h),
        ("self_attn.o_proj", h, h),
        ("mlp.gate_proj", shape.intermediate_size, h),
        ("mlp.up_proj", shape.intermediate_size, h),
        ("mlp.down_proj", h, shape.intermediate_size),
    ):
        yield from _quantized(f"{prefix}.{name}", rows, columns, dtype)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", mx.ones((h,), dtype)


def _outside(shape: Shape, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    mx.random.seed(999)
    for name in ("model.embed_tokens", "lm_head"):
        yield from _quantized(name, shape.vocab_size, shape.hidden_size, dtype)
    yield "model.norm.weight", mx.ones((shape.hidden_size,), dtype)


def _quantized(name: str, rows: int, columns: int, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Return random codes with a scale and an offset for mean 0 and the right spread, without quantizing anything."""
    codes = 2**BITS
    step = SPREAD / ((codes**2 - 1) / 12) ** 0.5
    scales = step * mx.random.uniform(0.9, 1.1, (rows, columns // GROUP))
    yield f"{name}.weight", mx.random.randint(0, 2**16, (rows, columns * BITS // 16), mx.uint16).view(mx.uint32)
    yield f"{name}.scales", scales.astype(dtype)
    yield f"{name}.biases", (-(codes - 1) / 2 * scales).astype(dtype)
