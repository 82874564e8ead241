"""Finds the lengths at which later prompts of a conversation may part from this one.

A later prompt has the same system message and tools, or the same messages so far. What follows is another text, or is
rendered anew: many templates drop the reasoning of earlier answers. It knows texts and a template, nothing of caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cluster.core.request import ChatMessage

__all__ = ["find_split_points"]

Render = Callable[[Sequence[ChatMessage], bool], str | None]
"""Renders messages, with or without the start of an answer after them; returns None if the template rejects them."""
Encode = Callable[[str], Sequence[int]]


def find_split_points(messages: Sequence[ChatMessage], ids: Sequence[int], render: Render, encode: Encode) -> list[int]:
    """Return ascending lengths, in tokens, of beginnings that later prompts are likely to share.

    ``ids`` is the prompt: ``encode`` of ``render`` of ``messages`` with the start of an answer.
    """
    text = render(messages, True) or ""
    found: set[int] = set()
    for shorter, starts_answer in _beginnings(messages):
        if (rendered := render(shorter, starts_answer)) is not None:
            found.add(_tokens_before(_shared_length(text, rendered), text, ids, encode))
    return sorted(found - {0, len(ids)})


def _beginnings(messages: Sequence[ChatMessage]) -> Iterator[tuple[Sequence[ChatMessage], bool]]:
    """Yield conversations that share a beginning with ``messages``: another one, and this one up to some message."""
    system = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    first = messages[system].content if system < len(messages) else ""
    yield (*messages[:system], ChatMessage("user", "1" if first.startswith("0") else "0")), True
    last_question = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    if 0 <= last_question < len(messages) - 1:
        yield messages[: last_question + 1], False
    yield messages, False


def _shared_length(a: str, b: str) -> int:
    """Return the number of characters that both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tokens_before(characters: int, text: str, ids: Sequence[int], encode: Encode) -> int:
    """Return how many tokens of ``ids`` lie within the first ``characters`` of ``text``.

    Encode the end of the text if that is shorter, unless a token crosses the split point.
    """
    if characters > len(text) // 2:
        end = encode(text[characters:])
        if tuple(ids[len(ids) - len(end) :]) == tuple(end):
            return len(ids) - len(end)
    start = encode(text[:characters])
    return next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))
