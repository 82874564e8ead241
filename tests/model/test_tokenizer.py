"""Text and tokens: templates, the end of answers, and streamed text in whole characters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from checkpoints import SPECIAL_IDS, VOCABULARY, make_tokenizer
from cluster.core.errors import BadCheckpoint, InvalidRequest
from cluster.core.request import ChatMessage
from cluster.model.tokenizer import UNDECIDED, TextDecoder, Tokenizer, load_tokenizer

END = SPECIAL_IDS["<|end|>"]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return load_tokenizer(checkpoint("llama"))


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    """A copy to change."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "copy")


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*(decoder.add(token) for token in ids), decoder.flush()]


def test_text_goes_there_and_back(tokenizer: Tokenizer) -> None:
    text = "the thé 漢字 😀\n  two  spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("the")[0] == 257
    assert tokenizer.vocab_size == 258 + len(SPECIAL_IDS)


def test_incomplete_characters_are_not_decoded_again_at_each_token(tokenizer: Tokenizer) -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    first_of_three = tokenizer.encode("漢")[0]
    for ids in ([first_of_three] * 500, [*tokenizer.encode("a"), *[first_of_three] * 500, *tokenizer.encode("漢字 b")]):
        decoder = TextDecoder(decode)
        pieces = [decoder.add(token) for token in ids]
        assert sum(map(len, pieces)) >= 500 - 2 * UNDECIDED
        assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(ids)
    assert longest <= 2 * UNDECIDED + 2


def test_special_tokens_are_added_unless_told_not_to(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [SPECIAL_IDS["<s>"]], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    bare = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == (SPECIAL_IDS["<s>"], *bare)


def test_a_chat_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat([ChatMessage("user", "hi"), ChatMessage("assistant", "yo"), ChatMessage("user", "go")])
    assert tokenizer.decode(ids) == "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>go<|end|><|assistant|>"
    assert ids[0] == SPECIAL_IDS["<|user|>"]


def test_a_template_that_refuses_is_quoted(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Unknown role: tool"):
        tokenizer.chat([ChatMessage("tool", "x")])


@pytest.mark.parametrize(
    "template", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{% if %}", "{{ ''.__class__.mro() }}"]
)
def test_a_template_that_fails_is_a_bad_request(template: str, folder: Path) -> None:
    make_tokenizer(folder, template)
    with pytest.raises(InvalidRequest, match="chat template"):
        load_tokenizer(folder).chat([ChatMessage("user", "x")])


def test_a_model_without_a_template_says_so(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="raw"):
        load_tokenizer(folder).chat([ChatMessage("user", "x")])


def test_answers_end_at_the_configs_and_the_tokenizers_token(tokenizer: Tokenizer, folder: Path) -> None:
    assert tokenizer.eos == {END, SPECIAL_IDS["</s>"]}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert load_tokenizer(folder).eos == {3, 4, SPECIAL_IDS["</s>"]}
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"eos_token_id": 9}}))
    assert load_tokenizer(folder).eos == {9, SPECIAL_IDS["</s>"]}


def test_a_missing_or_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="cannot be used"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint, match="no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("loadable", [False, True])
def test_a_tokenizers_own_code_is_never_run(loadable: bool, folder: Path) -> None:
    """Refused where nothing else could load the tokenizer, passed over where transformers knows the class."""
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(known if loadable else {"auto_map": auto_map}))
    if loadable:
        assert load_tokenizer(folder).encode("the") == (257,)
    else:
        with pytest.raises(BadCheckpoint, match="never runs code"):
            load_tokenizer(folder)


def test_one_tokens_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(257) == "the"
    assert tokenizer.token_text(tokenizer.encode("é")[0]) == "\ufffd"
    assert tokenizer.token_text(VOCABULARY - 1) == ""  # a logit that no token has


TEXTS = st.lists(st.sampled_from(["the", "é", "漢", "😀", " ", "\n", "\ufffd", "<|end|>", "e\u0301"]), max_size=12)


@given(TEXTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_text_streams_in_whole_characters(tokenizer: Tokenizer, parts: list[str]) -> None:
    """Every piece is whole: no U+FFFD but those that are in the text, and all together are the text."""
    text = "".join(parts)
    pieces = stream(tokenizer, list(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_tokens_stream_to_what_they_decode_to(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, list(tokenizer.encode("a😀b"))) == ["a", "", "", "", "😀", "b", ""]
    assert stream(tokenizer, list(tokenizer.encode("a😀"))[:-1]) == ["a", "", "", "", "\ufffd"]


def test_leading_spaces_survive_a_tokenizer_that_strips_them(folder: Path) -> None:
    """Llama 2's kind: the first token of a text loses its space, the first of a piece must not."""
    vocabulary = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, **{f"<0x{i:02X}>": 4 + i for i in range(256)}}
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))  # type: ignore[call-arg]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    smile = [4 + byte for byte in "😀".encode()]
    ids = [1, 2, *smile, 2, 3, 1]
    assert tokenizer.decode(ids) == "a b😀 bc a"
    assert stream(tokenizer, ids) == ["a", " b", "", "", "", "😀", " b", "c", " a", ""]
