"""Where in a rendered text the tokens are, for tokenizers that tell it and for others."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cluster.model.checkpoint import BUNDLED
from cluster.model.rendered_prompt import tokenize
from cluster.model.tokenizer import load_tokenizer

TEXT = "What is a hop? It is 2 µs — 😀 long.\n  Really?"


class Slow:
    """A tokenizer that does not tell where its tokens are."""

    def __init__(self, wrapper: Any) -> None:
        self.encode = wrapper.encode


@pytest.mark.parametrize("fast", [True, False])
def test_the_tokens_before_a_character_are_those_that_end_there(fast: bool) -> None:
    tokenizer = load_tokenizer(BUNDLED / "faq")
    prompt = tokenize(cast(Any, tokenizer._wrapper if fast else Slow(tokenizer._wrapper)), TEXT)
    assert prompt.ids == tokenizer.encode(TEXT, False)
    assert prompt.tokens_before(0) == 0
    assert prompt.tokens_before(len(TEXT)) == len(prompt.ids)
    for characters in range(1, len(TEXT)):
        count = prompt.tokens_before(characters)
        assert TEXT.startswith(tokenizer.decode(prompt.ids[:count]).rstrip("\ufffd"))
        assert len(tokenizer.decode(prompt.ids[:count]).rstrip("\ufffd")) <= characters
