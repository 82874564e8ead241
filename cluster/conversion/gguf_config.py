"""Builds a model's config.json from the metadata of a GGUF file, for the architectures that can be converted.

The keys of the metadata are those of the GGUF specification; the keys of the config are those of mlx-lm's model code.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It knows names and numbers; it reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

from cluster.core.errors import BadCheckpoint, ModelUnsupported

__all__ = ["ARCHITECTURES", "build_config", "require_supported"]

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
"""Architecture in a GGUF file -> mlx-lm's ``model_type``. Mistral's files say llama."""

GEMMA_PATTERN: Final = 6
"""Every so many layers of Gemma 3, one has full attention."""
GEMMA_LOCAL_ROPE: Final = 10_000.0
GEMMA_27B_LAYERS: Final = 62
"""Gemma 3's largest model scales its queries by another width than its heads'; the file does not say so."""
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""The constants with which every Llama 3.1 to 3.3 model was published; a file has only the factors that follow."""
TURN_ENDS: Final = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|eom_id|>")
"""Tokens that end a turn in chats, whatever the file names as its end token."""
CONTROL: Final = 3
"""Type of a token that is never part of a text."""
EOS_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")


def require_supported(metadata: Mapping[str, Any]) -> str:
    """Return the file's architecture. Raise ModelUnsupported, which names it, if it cannot be converted."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(
            f"GGUF files of the architecture {architecture!r} cannot be converted; supported are "
            f"{', '.join(ARCHITECTURES)} (Mistral's say llama). Convert the model's safetensors version instead"
        )
    if metadata.get(f"{architecture}.expert_count", 0):
        raise ModelUnsupported(
            f"this GGUF file has a mixture of experts ({architecture} with {metadata[f'{architecture}.expert_count']} "
            "experts), which cannot be converted; convert the model's safetensors version instead"
        )
    return str(architecture)


def build_config(
    metadata: Mapping[str, Any], tensors: Set[str], vocabulary: int, rope_factors: Sequence[float], dtype: str
) -> dict[str, Any]:
    """Return the config. ``tensors`` are the file's names, ``vocabulary`` the rows of its embedding.

    ``rope_factors`` is the content of ``rope_freqs.weight``, empty if there is none; ``dtype`` is the weights' type.
    Raises ModelUnsupported and BadCheckpoint (the metadata lacks a number).
    """
    architecture = require_supported(metadata)
    read = _Reader(metadata, architecture)
    heads, width = read.number("attention.head_count"), read.number("embedding_length")
    head_dim = read.number("attention.key_length", width // max(heads, 1))
    config = {
        "architectures": [_class_name(architecture)],
        "model_type": ARCHITECTURES[architecture],
        "hidden_size": width,
        "num_hidden_layers": read.number("block_count"),
        "intermediate_size": read.number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": read.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": read.number("context_length"),
        "rope_theta": read.real("rope.freq_base", 10_000.0),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": dtype,
        "eos_token_id": _end_tokens(metadata),
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if architecture == "gemma3":
        config |= _gemma(read, config)
    if scaling := _rope_scaling(read, config, rope_factors):
        config["rope_scaling"] = scaling
    return config


class _Reader:
    """Reads numbers of one architecture. Raises BadCheckpoint for what is missing or no number."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._architecture = metadata, architecture

    def number(self, key: str, default: int | None = None) -> int:
        found = self._read(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise self._invalid_value_error(key, found)
        return found

    def real(self, key: str, default: float | None = None) -> float:
        found = self._read(key, default)
        if not isinstance(found, int | float) or not math.isfinite(found):
            raise self._invalid_value_error(key, found)
        return float(found)

    def text(self, key: str) -> str:
        return str(self._metadata.get(f"{self._architecture}.{key}", ""))

    def _read(self, key: str, default: float | None) -> Any:
        found = self._metadata.get(f"{self._architecture}.{key}", default)
        if found is None:
            raise BadCheckpoint(
                f"the GGUF file has no {self._architecture}.{key} in its metadata; get the file again, or another one"
            )
        return found

    def _invalid_value_error(self, key: str, found: object) -> BadCheckpoint:
        return BadCheckpoint(
            f"{self._architecture}.{key} in the GGUF file's metadata is {str(found)[:40]!r}, which is not usable; get "
            "the file again, or another one"
        )


def _class_name(architecture: str) -> str:
    return {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}[architecture] + "ForCausalLM"


def _gemma(read: _Reader, config: Mapping[str, Any]) -> dict[str, Any]:
    large = config["num_hidden_layers"] == GEMMA_27B_LAYERS
    scale = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    return {
        "query_pre_attn_scalar": scale,
        "sliding_window": read.number("attention.sliding_window"),
        "sliding_window_pattern": read.number("attention.sliding_window_pattern", GEMMA_PATTERN),
        "rope_local_base_freq": read.real("rope.freq_base_swa", GEMMA_LOCAL_ROPE),
    }


def _rope_scaling(
    read: _Reader, config: Mapping[str, Any], rope_factors: Sequence[float]
) -> dict[str, float | str] | None:
    if rope_factors:
        return _llama3_scaling(config, rope_factors)
    kind = read.text("rope.scaling.type")
    if kind in ("", "none"):
        return None
    factor = read.real("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = read.number("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelUnsupported(
        f"the GGUF file scales its positions by the method {kind!r}, which cannot be converted; convert the model's "
        "safetensors version instead"
    )


def _llama3_scaling(config: Mapping[str, Any], found: Sequence[float]) -> dict[str, float | str]:
    """Return the settings of which ``found`` are the factors. Raise ModelUnsupported if they are not Llama 3's."""
    factor = max(found)
    expected = _llama3_factors(config["head_dim"], config["rope_theta"], factor)
    same = len(expected) == len(found) and all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(expected, found, strict=True)
    )
    if not same:
        raise ModelUnsupported(
            "the GGUF file scales its positions by factors that are not Llama 3's (rope_freqs.weight), which cannot be "
            "converted; convert the model's safetensors version instead"
        )
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _llama3_factors(head_dim: int, base: float, factor: float) -> list[float]:
    """Return by what Llama 3's scaling divides each frequency: 1 for short waves, ``factor`` for long ones."""
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (pair / head_dim)
        if wavelength < LLAMA3_CONTEXT / LLAMA3_HIGH:
            factors.append(1.0)
        elif wavelength > LLAMA3_CONTEXT / LLAMA3_LOW:
            factors.append(factor)
        else:
            smooth = (LLAMA3_CONTEXT / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    named = [metadata[f"tokenizer.ggml.{key}"] for key in EOS_KEYS if f"tokenizer.ggml.{key}" in metadata]
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    types = metadata.get("tokenizer.ggml.token_type") or ()
    pairs = enumerate(zip(tokens, types, strict=False))
    turns = [i for i, (text, kind) in pairs if kind == CONTROL and text in TURN_ENDS]
    return [*dict.fromkeys([*named, *turns])]
