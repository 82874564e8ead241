"""Finds the lengths at which later prompts of a conversation may part from this one.

A later prompt has the same system message and tools, or the same messages so far. What follows is another text, or is
rendered anew: many templates drop the reasoning of earlier answers. It may also have only the first few tools or
messages: that of a sub-agent, or after an edit. It knows texts and a template, nothing of caches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from cluster.core.limits import MAX_BORDERS
from cluster.core.request import ChatMessage

__all__ = ["SplitPoints", "find_split_points", "shared_length"]

_CONTENT_CHARS: Final = 64
"""Characters by which a message's content is found in the rendered text."""
_MOST_MISSING: Final = 8
"""Contents that a template may have changed or left out before the rest is not looked for."""
_SECTION: Final = re.compile(r"^(?=#{1,6} |<\w|---$|```\w)", re.MULTILINE)
"""The beginning of a section: a heading, a tag, a rule or a fenced block. What changes between sessions, as the date or
the repository's state, has one."""
Render = Callable[[Sequence[ChatMessage], bool], str | None]
"""Renders messages, with or without the start of an answer after them; returns None if the template rejects them."""
TokensBefore = Callable[[int], int]
"""Returns how many tokens of a text lie within its first so many characters."""


class SplitPoints(NamedTuple):
    """Ascending lengths, in tokens, of beginnings that later prompts may share: ``likely``, or at a ``border``.

    A border is the beginning of a message, of a tool, or of a section of the system message.
    """

    likely: tuple[int, ...] = ()
    borders: tuple[int, ...] = ()


def find_split_points(
    messages: Sequence[ChatMessage], tools: Iterable[str], text: str, render: Render, tokens_before: TokensBefore
) -> SplitPoints:
    """Return where prompts may part from ``text``: ``render`` of ``messages`` with the start of an answer.

    ``tools`` are the names of the tools in it.
    """
    rendered = [render(shorter, starts_answer) for shorter, starts_answer in _beginnings(messages)]
    likely = {shared_length(text, each) for each in rendered if each is not None}
    ends = {0, tokens_before(len(text))}
    lengths = {*map(tokens_before, likely)} - ends
    borders = {*map(tokens_before, _find_borders(messages, tools, text))} - ends - lengths
    return SplitPoints(tuple(sorted(lengths)), tuple(sorted(borders)))


def _find_borders(messages: Sequence[ChatMessage], tools: Iterable[str], text: str) -> list[int]:
    """Return ascending positions in the text at which a tool, a message, or a section of a system message begins.

    If there are too many, they are thinned out evenly.
    """
    contents = [message.content.strip() for message in messages]
    starts = _find_in_order(text, [content[:_CONTENT_CHARS] for content in contents])
    found = {*starts, *_find_in_order(text, [f'"{name}"' for name in tools])} - {-1}
    for message, content, start in zip(messages, contents, starts, strict=True):
        if message.role == "system" and start >= 0 and text.startswith(content, start):
            found |= {start + section.start() for section in _SECTION.finditer(content)}
    borders = sorted(found)
    return borders[:: -(-len(borders) // MAX_BORDERS)] if borders else []


def _find_in_order(text: str, parts: Sequence[str]) -> list[int]:
    """Return where each part begins in the text, at or after the one before; -1 for those that are not found.

    Each one that is not there costs a search of the whole text, so the search ends after a few of them.
    """
    starts, at, missing = [-1] * len(parts), 0, 0
    for i, part in enumerate(parts):
        starts[i] = text.find(part, at) if part else -1
        at = max(at, starts[i])
        missing += bool(part) and starts[i] < 0
        if missing == _MOST_MISSING:
            break
    return starts


def _beginnings(messages: Sequence[ChatMessage]) -> Iterator[tuple[Sequence[ChatMessage], bool]]:
    """Yield conversations that share a beginning with ``messages``: another one, and this one up to some message."""
    system = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    first = messages[system].content if system < len(messages) else ""
    yield (*messages[:system], ChatMessage("user", "1" if first.startswith("0") else "0")), True
    last_question = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    if 0 <= last_question < len(messages) - 1:
        yield messages[: last_question + 1], False
    yield (*messages, ChatMessage("assistant", "0")), False


def shared_length(a: str, b: str) -> int:
    """Return the number of characters that both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
