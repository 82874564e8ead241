"""Checks the bounds of a tokenizer's files before the tokenizer is loaded.

The load time grows with the square of the added tokens, and a chat template is compiled as a program.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from cluster.core.errors import BadCheckpoint
from cluster.core.limits import (
    MAX_ADDED_TOKENS,
    MAX_CHAT_TEMPLATE_CHARS,
    MAX_SMALL_FILE_BYTES,
    MAX_TOKEN_CHARS,
    MAX_VOCABULARY,
)

__all__ = ["require_bounded"]

JSON_FILES: Final = (
    "added_tokens.json",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
TEXT_FILES: Final = ("merges.txt", "tiktoken.model", "tokenizer.model", "vocab.txt")


def require_bounded(folder: Path) -> None:
    """Raise BadCheckpoint, which names the file, if the tokenizer in ``folder`` exceeds a bound.

    A file that cannot be parsed passes, since the loader reports a better error.
    """
    for name in (*JSON_FILES, *TEXT_FILES):
        _require_size(folder / name)
    for file in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        _require_size(file, 4 * MAX_CHAT_TEMPLATE_CHARS)
        if file.is_file():
            _require_template(file, file.read_text(encoding="utf-8", errors="replace"))
    for name in JSON_FILES:
        _require_bounded_json(folder / name)


def _require_size(file: Path, most: int = MAX_SMALL_FILE_BYTES) -> None:
    if file.is_file() and file.stat().st_size > most:
        raise _excess(file, f"{file.stat().st_size} bytes", most)


def _require_bounded_json(file: Path) -> None:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    _require_templates(file, content.get("chat_template"))
    if file.name == "vocab.json":
        _require_tokens(file, content, MAX_VOCABULARY, "tokens")
    elif file.name == "added_tokens.json":
        _require_tokens(file, content, MAX_ADDED_TOKENS, "added tokens")
    for key in ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        _require_tokens(file, _contents(content.get(key)), MAX_ADDED_TOKENS, "added tokens")
    model = content.get("model")
    if isinstance(model, dict):
        _require_tokens(file, _contents(model.get("vocab"), keys=True), MAX_VOCABULARY, "tokens")
        merges = model.get("merges")
        if isinstance(merges, list) and len(merges) > MAX_VOCABULARY:
            raise _excess(file, f"{len(merges)} merges", MAX_VOCABULARY)


def _contents(tokens: Any, *, keys: bool = False) -> list[str]:
    """Return the text of each token in a list or in an object's keys or values; "" for a token of another form."""
    items: Iterable[Any] = ()
    if isinstance(tokens, dict):
        items = tokens if keys else tokens.values()
    elif isinstance(tokens, list):
        items = tokens
    return [_text(item) for item in items]


def _text(item: Any) -> str:
    if isinstance(item, dict):
        item = item.get("content")
    elif isinstance(item, list) and item:  # a token of a unigram model, with its score
        item = item[0]
    return item if isinstance(item, str) else ""


def _require_tokens(file: Path, tokens: Iterable[str], most: int, what: str) -> None:
    found = list(tokens)
    if len(found) > most:
        raise _excess(file, f"{len(found)} {what}", most)
    longest = max(map(len, found), default=0)
    if longest > MAX_TOKEN_CHARS:
        raise _excess(file, f"a token of {longest} characters", MAX_TOKEN_CHARS)


def _require_templates(file: Path, template: Any) -> None:
    for text in _template_texts(template):
        _require_template(file, text)


def _template_texts(template: Any) -> Iterator[str]:
    """Return the texts of a template: a string, ``[{"name": ..., "template": ...}]`` or ``{name: text}``."""
    if isinstance(template, str):
        yield template
    elif isinstance(template, dict):
        yield from (text for text in template.values() if isinstance(text, str))
    elif isinstance(template, list):
        for item in template:
            yield from _template_texts(item)


def _require_template(file: Path, text: str) -> None:
    if len(text) > MAX_CHAT_TEMPLATE_CHARS:
        raise _excess(file, f"a chat template of {len(text)} characters", MAX_CHAT_TEMPLATE_CHARS)


def _excess(file: Path, found: str, most: int) -> BadCheckpoint:
    return BadCheckpoint(
        f"{file.name} in {str(file.parent)!r} has {found}; at most {most} are allowed; copy or fetch the model again "
        "from a source that you trust",
        file=file.name,
    )
