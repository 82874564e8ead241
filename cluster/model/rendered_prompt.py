"""A conversation as text and as tokens, and where in the text each token is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = ["RenderedPrompt", "tokenize"]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """``ids`` are the tokens of ``text``; ``tokens_before`` returns how many lie within so many characters."""

    text: str
    ids: tuple[int, ...]
    tokens_before: Callable[[int], int]


def tokenize(wrapper: TokenizerWrapper, text: str) -> RenderedPrompt:
    """Tokenize a rendered text, without adding special tokens."""
    if not getattr(wrapper, "is_fast", False):
        return _tokenize_slowly(wrapper, text)
    encoded = wrapper._tokenizer(text, add_special_tokens=False, return_attention_mask=False)
    ids = tuple(encoded["input_ids"])
    (tokens,) = encoded.encodings

    def tokens_before(characters: int) -> int:
        found = (tokens.char_to_token(at) for at in range(characters, len(text)))
        return next((token for token in found if token is not None), len(ids))

    return RenderedPrompt(text, ids, tokens_before)


def _tokenize_slowly(wrapper: Any, text: str) -> RenderedPrompt:
    """Tokenize with a tokenizer that does not tell where its tokens are."""
    ids = tuple(wrapper.encode(text, add_special_tokens=False))

    def tokens_before(characters: int) -> int:
        if characters >= len(text):
            return len(ids)
        start = wrapper.encode(text[:characters], add_special_tokens=False)
        return next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))

    return RenderedPrompt(text, ids, tokens_before)
