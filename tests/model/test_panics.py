"""A panic of a Rust library is an ordinary error wherever a tokenizer or a grammar is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.core.request import ChatMessage
from cluster.model.panics import is_panic, panics_raised_as
from cluster.model.tokenizer import Tokenizer, load_tokenizer

SLOW = "a" * 60 + "!"
"""The library of this regular expression gives up at it, with a panic."""


@pytest.fixture(scope="module")
def panicking(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Tokenizer:
    folder = shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("panics") / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    pattern = {"Regex": r"(a+)+$|(x+x+)+y"}
    content["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [content["decoder"], {"type": "Replace", "pattern": pattern, "content": ""}],
    }
    file.write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_a_panic_is_none_of_pythons_errors(panicking: Tokenizer) -> None:
    with pytest.raises(BaseException) as raised:  # noqa: PT011  # its class cannot be imported
        panicking._wrapper.encode(SLOW)
    assert is_panic(raised.value)
    assert not isinstance(raised.value, Exception)
    assert not is_panic(ValueError())
    assert not is_panic(KeyboardInterrupt())


def test_text_at_which_the_tokenizer_panics_is_a_bad_request(panicking: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="the model's tokenizer fails on this text") as refused:
        panicking.encode(SLOW)
    assert refused.value.field == "prompt"
    with pytest.raises(InvalidRequest, match="the model's tokenizer fails on these messages") as refused:
        panicking.chat([ChatMessage("user", SLOW)])
    assert refused.value.field == "messages"
    assert panicking.encode("the")


def test_tokens_at_which_the_decoder_panics_are_an_error(panicking: Tokenizer) -> None:
    ids = [token for letter in SLOW for token in panicking.encode(letter)]
    with pytest.raises(MacpipeError, match="cannot decode its own tokens"):
        panicking.decode(ids)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), panics_raised_as(ValueError("a panic")):
        raise KeyError("an error")
