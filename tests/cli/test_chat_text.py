"""What a person types into a chat, and how the answer is laid out, without a terminal."""

from __future__ import annotations

import io
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from cluster.cli.chat import read_message, read_piped_lines
from cluster.cli.main import app
from cluster.cli.pause_watch import PauseWatch
from cluster.cli.word_wrap import WordWrapper
from cluster.core.cluster_state import Repair
from cluster.core.errors import InvalidOption

WRAPPED = [
    ("one two three four", "one two\nthree four"),
    ("one two  x", "one two  x"),
    ("0123456789 ab", "0123456789\nab"),
    ("0123456789abcdef gh", "0123456789abcdef\ngh"),
    ("a\n\nbb", "a\n\nbb"),
    ("日本 日本 日本", "日本 日本\n日本"),
    ("```py\nx = a_long_name + 1\n```\nand these words", "```py\nx = a_long_name + 1\n```\nand these\nwords"),
]


@pytest.mark.parametrize(("text", "shown"), WRAPPED)
def test_an_answer_wraps_at_words_however_it_arrives(text: str, shown: str) -> None:
    for size in (1, 3, len(text)):
        wrapper = WordWrapper(10)
        pieces = [wrapper.add(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join([*pieces, wrapper.flush()]) == shown


def test_a_message_may_have_lines() -> None:
    def read_all(*typed: str, pasted: int = 0) -> str:
        lines, more = iter(typed), iter([True] * pasted + [False])
        return read_message(lambda _: next(lines), lambda: next(more))

    assert read_all("Why?") == "Why?"
    assert read_all("one\\", "two\\", "three") == "one\ntwo\nthree"
    assert read_all("def f():", "    pass", pasted=1) == "def f():\n    pass"
    with pytest.raises(UnicodeError):
        read_all("\udce4")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_piped_line_that_is_not_utf8_ends_the_chat(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines before it are sent. Locales differ in ``errors``."""
    piped = io.BytesIO(b"Why?\nhi \xed\xa0\x80 there\nHow?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped, encoding="utf-8", errors=errors))
    lines = read_piped_lines()
    assert next(lines) == "Why?"
    with pytest.raises(InvalidOption) as refused:
        next(lines)
    assert refused.value.sentence == (
        "line 2 of standard input holds bytes that are not UTF-8, so it was not sent; convert it, for example with "
        "iconv"
    )


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("generate -p", "-p / --prompt"),
        ("generate -p hi --system", "--system"),
        ("chat -m", "-m / --message"),
        ("chat --system", "--system"),
    ],
)
def test_an_option_that_is_not_utf8_is_named(command: str, source: str) -> None:
    ended = CliRunner().invoke(app, [*command.split(), "a\udced\udca0\udc80"], prog_name="macpipe")
    assert isinstance(ended.exception, InvalidOption)
    assert ended.exception.sentence.startswith(f"{source} holds bytes that are not UTF-8, so it was not sent; ")


class Recovering:
    """A coordinator's client: it is asked once before a recovery, then during it."""

    def __init__(self) -> None:
        plan = Repair("mac-3", "mac-3 stopped answering", 1.0, "reloading its layers on mac-1 and mac-2", 4.0, 1)
        self.repairs = [None, replace(plan, attempts=0, doing="asking the workers"), plan, plan]
        self.asked = threading.Semaphore(0)

    def cluster(self) -> Any:
        repair = self.repairs.pop(0) if len(self.repairs) > 1 else self.repairs[0]
        self.asked.release()
        return SimpleNamespace(repair=repair)


def test_a_pause_is_explained_once() -> None:
    client, told = Recovering(), list[str]()
    with PauseWatch(cast(Any, client), told.append, pause_s=0.01):
        for _ in range(6):
            assert client.asked.acquire(timeout=20)
    assert told == ["mac-3 stopped answering; reloading its layers on mac-1 and mac-2"]


def test_nobody_is_asked_while_an_answer_comes() -> None:
    client = Recovering()
    watch = PauseWatch(cast(Any, client), lambda _: None, pause_s=1000)
    watch.hear()
    assert not watch._pauses()
    watch._last -= 1001
    assert watch._pauses()


def test_a_note_begins_on_a_line_of_its_own() -> None:
    wrapper = WordWrapper(20)
    shown = wrapper.add("Some words of ") + wrapper.break_line()
    assert shown == "Some words of\n"
    assert wrapper.break_line() == ""
    assert wrapper.add("an answer that goes on") + wrapper.flush() == "an answer that goes\non"
