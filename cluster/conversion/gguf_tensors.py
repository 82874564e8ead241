"""Maps the tensors of a GGUF file to those of mlx-lm's models: names, order of rows, and norms stored plus one.

It knows names and shapes; it reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.core.errors import ModelUnsupported

__all__ = ["GgufTensor", "StoredTensor", "group_of", "map_tensors"]

OUTSIDE: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
PARTS: Final[Mapping[str, str]] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_PARTS: Final[Mapping[str, str]] = {
    **PARTS,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
IGNORED: Final = frozenset({"rope_freqs.weight"})
"""Tensors that the config stands for."""
_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
_LAYER: Final = re.compile(r"model\.layers\.\d+")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a GGUF file: its type's number, its shape (rows first), and where its bytes are."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the model, and how it is made of the stored one.

    ``heads``: the rows of each head are stored with even and odd ones apart; 0 if they are in order. ``shift`` is added
    to each number.
    """

    name: str
    stored: StoredTensor
    heads: int = 0
    shift: float = 0.0


def map_tensors(architecture: str, config: Mapping[str, Any], stored: Iterable[StoredTensor]) -> tuple[GgufTensor, ...]:
    """Return the model's tensors. Raises ModelUnsupported, which names the tensor, for one that the model has not."""
    return tuple(_map(architecture, config, one) for one in stored if one.name not in IGNORED)


def group_of(name: str) -> str:
    """Return the layer of a tensor of the model, or its module outside the layers: what is read together."""
    found = _LAYER.match(name)
    return found[0] if found else name.rpartition(".")[0]


def _map(architecture: str, config: Mapping[str, Any], stored: StoredTensor) -> GgufTensor:
    found = _NAME.fullmatch(stored.name)
    parts = GEMMA_PARTS if architecture == "gemma3" else PARTS
    module = None
    if found:
        module = OUTSIDE.get(found["part"]) if found["layer"] is None else parts.get(found["part"])
    if not found or module is None:
        raise ModelUnsupported(
            f"the GGUF file has a tensor {stored.name[:80]!r} that {architecture} models do not have; convert the "
            "model's safetensors version instead"
        )
    prefix = "" if found["layer"] is None else f"model.layers.{found['layer']}."
    heads = _interleaved_heads(architecture, found["part"], config)
    shift = -1.0 if architecture == "gemma3" and "norm" in found["part"] else 0.0
    return GgufTensor(f"{prefix}{module}.{found['kind']}", stored, heads, shift)


def _interleaved_heads(architecture: str, part: str, config: Mapping[str, Any]) -> int:
    """Return the number of heads whose rows have another order in the file than in the model: llama's rotary ones."""
    if architecture != "llama" or part not in ("attn_q", "attn_k"):
        return 0
    return int(config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])
