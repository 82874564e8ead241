"""The count by pieces is never above the true one, and stops at the first piece that is too much."""

from __future__ import annotations

import string
from random import Random

import pytest

from cluster.core.errors import PromptTooLong
from cluster.core.limits import WHOLE_PROMPT_BYTES
from cluster.model import prompt_length
from cluster.model.checkpoint import BUNDLED
from cluster.model.prompt_length import require_at_most
from cluster.model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUNDLED / "faq")


def test_a_text_is_never_refused_whose_tokens_fit(
    tokenizer: Tokenizer, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces are so small that cuts matter: the largest text of this size has one token less than it may."""
    monkeypatch.setattr(prompt_length, "WHOLE_PROMPT_BYTES", 0)
    monkeypatch.setattr(prompt_length, "PIECE_CHARS", 64)
    monkeypatch.setattr(prompt_length, "EXTRA_TOKENS", 16)
    for _ in range(50):
        words = ["".join(rng.choices(string.printable + "é漢", k=rng.randint(1, 9))) for _ in range(4)]
        text = " ".join(rng.choices(words, k=rng.randint(1, 300)))
        count = len(tokenizer.encode(text))
        assert len(tokenizer.encode(text, most=count)) == count


def test_a_text_of_too_many_tokens_is_refused_at_the_first_piece_that_shows_it() -> None:
    pieces: list[int] = []

    def encode(piece: str) -> list[int]:
        pieces.append(len(piece))
        return [0] * len(piece)

    text = "é" * WHOLE_PROMPT_BYTES
    with pytest.raises(PromptTooLong, match=f"has {2 * WHOLE_PROMPT_BYTES} bytes and more than 1000 tokens") as caught:
        require_at_most(1000, text, encode, "messages")
    assert caught.value.field == "messages"
    assert pieces == [prompt_length.PIECE_CHARS]
    require_at_most(1000, "a" * WHOLE_PROMPT_BYTES, encode, "messages")
    assert len(pieces) == 1
