"""Streams the arguments of a tool call while the model writes them, for formats whose arguments are JSON.

It knows the text of one call after its opening marker. Calls in other formats are parsed once they are complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

__all__ = ["PartialToolCall"]

_HEADS: Final = {
    "json_tools": re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL),
}
"""Patterns of the text before the arguments object, by mlx-lm's name of the format."""


@dataclass(slots=True)
class PartialToolCall:
    """A call of tool ``name`` in progress. Text that does not belong to the arguments is dropped."""

    name: str
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False
    _complete: bool = False

    @classmethod
    def start(cls, text: str, form: str, names: Collection[str]) -> tuple[PartialToolCall, int] | None:
        """Return the call that ``text`` starts and the index of its arguments.

        Return None if the head is incomplete, in another format, or names a tool that is not among ``names``.
        """
        head = _HEADS[form].match(text) if form in _HEADS else None
        if head is None:
            return None
        try:
            name = json.loads(head.group(1))
        except ValueError:
            return None
        return (cls(name), head.end()) if name in names else None

    def add(self, text: str) -> str:
        """Return the part of ``text`` that belongs to the arguments."""
        end = 0
        while end < len(text) and not self._complete:
            self._advance(text[end])
            end += 1
        return text[:end]

    def _advance(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._complete = self._depth == 0
