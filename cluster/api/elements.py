"""Counts the elements of a JSON text on its raw bytes, as they arrive, before anything is parsed.

What a parser builds of a body, and what it costs, follows from the number of its elements, not from its length: 16 MiB
may be one string or eight million lists. It refuses to know whether the text is valid JSON: for a valid text the counts
are exact, and a parser stops at the first error of any other, before which they are exact too.
"""

from __future__ import annotations

from typing import Final

from cluster.api.bounds import MAX_ELEMENTS, MAX_NUMBER_BYTES
from cluster.core.errors import TooLarge
from cluster.core.limits import KIB

_STEP: Final = 64 * KIB
"""Bytes looked at in one go, so that no step takes longer than a few milliseconds."""
_SPACE: Final = b" \t\r\n"


class ElementCounter:
    """Feed it the text piece by piece. ``commas`` bounds the commas; brackets and colons have ``MAX_ELEMENTS``."""

    def __init__(self, commas: int = MAX_ELEMENTS) -> None:
        self._most_commas = commas
        self._commas = self._marks = self._quotes = self._numbers = 0
        self._quoted = self._escaped = False

    def feed(self, data: bytes) -> None:
        """Count the next bytes. Raises ``TooLarge``."""
        for start in range(0, len(data), _STEP):
            self._count(data[start : start + _STEP])

    def _count(self, data: bytes) -> None:
        outside = self._outside_strings(data)
        self._commas += outside.count(b",")
        self._marks += sum(outside.count(mark) for mark in (b"[", b"{", b":"))
        self._numbers += len(outside.translate(None, _SPACE))
        if self._commas > self._most_commas or self._marks > MAX_ELEMENTS:
            raise TooLarge(
                f"the body has more elements than a request may have ({self._most_commas} commas, {MAX_ELEMENTS} "
                "brackets and colons); send fewer or longer ones"
            )
        if self._numbers > MAX_NUMBER_BYTES:
            raise TooLarge(f"the body has more than {MAX_NUMBER_BYTES} bytes of numbers; send fewer or shorter ones")

    def _outside_strings(self, data: bytes) -> bytes:
        """``data`` without its strings. Escapes go first: then each quote that is left opens or closes one."""
        if self._escaped:
            data = data[1:]
        if b"\\" in data:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        self._escaped = data.endswith(b"\\")
        self._quotes += data.count(b'"')
        if self._quotes > 2 * (self._most_commas + 2 * MAX_ELEMENTS):
            raise TooLarge("the body has more strings than a request may have; send fewer of them")
        pieces = data.split(b'"')
        outside = b"".join(pieces[int(self._quoted) :: 2])
        self._quoted ^= len(pieces) % 2 == 0
        return outside


def count_elements(text: str) -> None:
    """Check a JSON text that came inside of a string. Raises ``TooLarge``."""
    ElementCounter().feed(text.encode("utf-8", "replace"))
