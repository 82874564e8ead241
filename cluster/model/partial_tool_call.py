"""A call of a tool while the model still writes it: its arguments as they come, for formats in which they are JSON.

It knows the text of one call after its opening mark. Where a text cannot be read so, the call is read once it is whole.
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
"""By mlx-lm's name for a format: all that stands before the object of arguments."""


@dataclass(slots=True)
class PartialToolCall:
    """The call of tool ``name``; what it is given that is no part of the arguments is left out."""

    name: str
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False
    _over: bool = False

    @classmethod
    def begun(cls, text: str, form: str, names: Collection[str]) -> tuple[PartialToolCall, int] | None:
        """The call that ``text`` begins, and where its arguments do; None while that is not known, or is not so."""
        head = _HEADS[form].match(text) if form in _HEADS else None
        if head is None:
            return None
        try:
            name = json.loads(head.group(1))
        except ValueError:
            return None
        return (cls(name), head.end()) if name in names else None

    def add(self, text: str) -> str:
        """The part of ``text`` that belongs to the arguments."""
        end = 0
        while end < len(text) and not self._over:
            self._pass(text[end])
            end += 1
        return text[:end]

    def _pass(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = character == "\\", character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._over = self._depth == 0
