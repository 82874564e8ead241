"""A conversation as text and as tokens, and where in the text each token is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = ["EncodedPiece", "RenderedPrompt", "join_pieces", "tokenize"]


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """What follows the first ``characters`` of a text, which have the first ``tokens``: its ``encoding``.

    Only the part up to the next piece counts.
    """

    characters: int
    tokens: int
    encoding: Any


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """``ids`` are the tokens of ``text``; ``tokens_before`` returns how many lie within so many characters.

    ``pieces`` are empty if the tokenizer does not tell where its tokens are.
    """

    text: str
    ids: tuple[int, ...]
    tokens_before: Callable[[int], int]
    pieces: tuple[EncodedPiece, ...] = ()


def tokenize(wrapper: TokenizerWrapper, text: str) -> RenderedPrompt:
    """Tokenize a rendered text, without adding special tokens."""
    if not getattr(wrapper, "is_fast", False):
        return _tokenize_slowly(wrapper, text)
    encoded = wrapper._tokenizer(text, add_special_tokens=False, return_attention_mask=False)
    (encoding,) = encoded.encodings
    return join_pieces(text, tuple(encoded["input_ids"]), (EncodedPiece(0, 0, encoding),))


def join_pieces(text: str, ids: tuple[int, ...], pieces: tuple[EncodedPiece, ...]) -> RenderedPrompt:
    """Return the prompt of these pieces, which are in the order of the text."""
    starts = [piece.characters for piece in pieces]

    def token_at(character: int) -> int | None:
        piece = pieces[bisect_right(starts, character) - 1]
        token: int | None = piece.encoding.char_to_token(character - piece.characters)
        return None if token is None else piece.tokens + token

    def tokens_before(characters: int) -> int:
        found = (token_at(at) for at in range(characters, len(text)))
        return next((token for token in found if token is not None), len(ids))

    return RenderedPrompt(text, ids, tokens_before, pieces)


def _tokenize_slowly(wrapper: Any, text: str) -> RenderedPrompt:
    """Tokenize with a tokenizer that does not tell where its tokens are."""
    ids = tuple(wrapper.encode(text, add_special_tokens=False))

    def tokens_before(characters: int) -> int:
        if characters >= len(text):
            return len(ids)
        start = wrapper.encode(text[:characters], add_special_tokens=False)
        return next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))

    return RenderedPrompt(text, ids, tokens_before)
