"""Tokenizers larger than any real one are refused before loading, by a sentence that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import BadCheckpoint
from cluster.core.limits import MAX_ADDED_TOKENS, MAX_CHAT_TEMPLATE_CHARS, MAX_SMALL_FILE_BYTES, MAX_TOKEN_CHARS
from cluster.model.tokenizer import load_tokenizer
from cluster.model.tokenizer_limits import require_bounded

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
TOO_LONG = "a" * (MAX_TOKEN_CHARS + 1)
LARGE = "x" * (MAX_CHAT_TEMPLATE_CHARS + 1)


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def added(count: int) -> list[dict[str, Any]]:
    return [{"id": 1000 + i, "content": f"<z{i}>", **FLAGS} for i in range(count)]


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("tokenizer.json", {"added_tokens": added(MAX_ADDED_TOKENS + 1)}, f"{MAX_ADDED_TOKENS + 1} added tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": 9, "content": TOO_LONG, **FLAGS}]}, "a token of 4097 characters"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {TOO_LONG: 0}}}, "a token of 4097 characters"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [[TOO_LONG, 0.0]]}}, "a token of 4097 characters"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": TOO_LONG}}}, "a token of 4097 characters"),
        ("tokenizer_config.json", {"chat_template": LARGE}, "a chat template of"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": LARGE}]}, "a chat template of"),
        ("chat_template.json", {"chat_template": LARGE}, "a chat template of"),
        ("added_tokens.json", {TOO_LONG: 9}, "a token of 4097 characters"),
        ("special_tokens_map.json", {"additional_special_tokens": [TOO_LONG]}, "a token of 4097 characters"),
    ],
)
def test_an_excess_is_named(name: str, fields: dict[str, Any], why: str, folder: Path) -> None:
    change(folder / name, **fields)
    with pytest.raises(BadCheckpoint, match=why) as refused:
        load_tokenizer(folder)
    assert refused.value.sentence.startswith(name)
    assert refused.value.details["file"] == name


def test_a_template_in_a_file_of_its_own_is_bounded(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'a' }}" * 100_000)
    with pytest.raises(BadCheckpoint, match=r"chat_template\.jinja in .* has a chat template of 900000 characters"):
        load_tokenizer(folder)


def test_a_file_is_bounded_before_it_is_read(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja"):
        whole = (folder / name).read_bytes() if (folder / name).exists() else None
        with (folder / name).open("ab") as file:
            file.truncate(MAX_SMALL_FILE_BYTES + 1)
        with pytest.raises(BadCheckpoint, match=rf"{name} in .* has {MAX_SMALL_FILE_BYTES + 1} bytes"):
            require_bounded(folder)
        (folder / name).write_bytes(whole) if whole is not None else (folder / name).unlink()


def test_ordinary_and_damaged_files_pass(folder: Path) -> None:
    require_bounded(folder)
    for text in (
        "",
        "[]",
        "{",
        '{"model": 5, "added_tokens": "x", "chat_template": 7}',
        '{"added_tokens": [1, [], {}]}',
    ):
        (folder / "tokenizer.json").write_text(text)
        require_bounded(folder)
