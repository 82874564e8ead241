"""Writes a tokenizer that a GGUF file describes: tokenizer.json, its config, and the chat template.

transformers builds it. This module adds what that leaves out: how SmolLM splits digits, the token before a text, and
the refusal of vocabularies whose splitting nobody here knows. A wrong split would give other tokens without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from cluster.core.errors import BadCheckpoint, ModelUnsupported

__all__ = ["write_tokenizer"]

FIELDS: Final[Mapping[str, str]] = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
}
"""Metadata below ``tokenizer.ggml`` -> the name that transformers gives it."""
SPECIALS: Final[Mapping[str, str]] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
SPLITS_DIGITS: Final = "smollm"
"""Splits as GPT-2 does, and each digit from its neighbours."""
PLAIN: Final = "gpt-2"
BYTE_PAIRS: Final = "gpt2"
"""The type of a tokenizer that merges bytes; it needs to say how it splits text first. ``llama`` does not split."""


def write_tokenizer(architecture: str, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer's files into ``folder``.

    Raises ModelUnsupported for a tokenizer of an unknown kind, BadCheckpoint for an unusable one, OSError.
    """
    named = {ours: f"tokenizer.ggml.{key}" for key, ours in FIELDS.items()}
    facts = {ours: metadata[key] for ours, key in named.items() if key in metadata}
    _require_known(facts)
    try:
        tokenizer, _ = convert_gguf_tokenizer(architecture, facts)
        specials = {name: facts["tokens"][metadata[f"tokenizer.ggml.{key}"]] for name, key in _named(metadata)}
    except Exception as error:  # libraries may raise anything for an invalid vocabulary
        raise BadCheckpoint(
            f"the tokenizer in the GGUF file cannot be read: {type(error).__name__}: {str(error)[:200]}; get the file "
            "again, or another one"
        ) from error
    _adjust(tokenizer, facts, metadata, specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _named(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, key) for name, key in SPECIALS.items() if f"tokenizer.ggml.{key}" in metadata]


def _require_known(facts: Mapping[str, Any]) -> None:
    kind, split = facts.get("tokenizer_type"), facts.get("pre_tokenizer_type")
    if kind not in ("llama", BYTE_PAIRS):
        raise ModelUnsupported(
            f"the GGUF file has a tokenizer of type {kind!r}, which cannot be converted; supported are gpt2 and llama. "
            "Convert the model's safetensors version instead"
        )
    if kind == BYTE_PAIRS and split not in (SPLITS_DIGITS, PLAIN, *GGUF_PRE_TOKENIZER_SPLITS):
        raise ModelUnsupported(
            f"the GGUF file's tokenizer splits text by the rules {split!r}, which are unknown here; convert the "
            "model's safetensors version instead"
        )


def _adjust(
    tokenizer: Tokenizer, facts: Mapping[str, Any], metadata: Mapping[str, Any], specials: Mapping[str, str]
) -> None:
    """Set how the tokenizer splits and begins texts, where the file says otherwise than transformers assumes."""
    if facts["tokenizer_type"] == BYTE_PAIRS and facts.get("pre_tokenizer_type") == SPLITS_DIGITS:
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
    sentencepiece = facts["tokenizer_type"] == "llama"
    if sentencepiece and not metadata.get("tokenizer.ggml.add_space_prefix", True):
        split = tokenizer.pre_tokenizer
        if isinstance(split, pre_tokenizers.Metaspace):
            split.prepend_scheme = "never"
    if metadata.get("tokenizer.ggml.add_bos_token", sentencepiece) and (first := specials.get("bos_token")):
        known = [(first, metadata["tokenizer.ggml.bos_token_id"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=known
        )
