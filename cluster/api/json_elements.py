"""Bounds the elements of a JSON text on its raw bytes, as they arrive and before they are parsed.

The cost of parsing depends on the number of elements, not on the length: 16 MiB may be one string or eight million
lists. This module does not check whether the text is valid JSON. The counts are exact for valid JSON. For invalid JSON
they are exact up to the first error, which is where a parser stops.
"""

from __future__ import annotations

from typing import Final

from cluster.api.limits import MAX_ELEMENTS, MAX_NUMBER_BYTES
from cluster.core.errors import TooLarge
from cluster.core.limits import KIB

_STEP: Final = 64 * KIB
"""Bytes per step, so that no step takes longer than a few milliseconds."""
_SPACE: Final = b" \t\r\n"


class ElementCounter:
    """Counts the elements of one text, fed in pieces.

    ``commas`` bounds the commas; ``MAX_ELEMENTS`` bounds the brackets and colons.
    """

    def __init__(self, commas: int = MAX_ELEMENTS) -> None:
        self._most_commas = commas
        self._commas = self._marks = self._quotes = self._numbers = 0
        self._quoted = self._escaped = False

    def feed(self, data: bytes) -> None:
        """Count the next bytes. Raises ``TooLarge`` if a bound is exceeded."""
        for start in range(0, len(data), _STEP):
            self._count(data[start : start + _STEP])

    def _count(self, data: bytes) -> None:
        outside = self._outside_strings(data)
        self._commas += outside.count(b",")
        self._marks += sum(outside.count(mark) for mark in (b"[", b"{", b":"))
        self._numbers += len(outside.translate(None, _SPACE))
        if self._commas > self._most_commas or self._marks > MAX_ELEMENTS:
            raise TooLarge(
                f"the JSON has too many elements: at most {self._most_commas} commas and {MAX_ELEMENTS} brackets and "
                "colons are allowed; send fewer or longer elements"
            )
        if self._numbers > MAX_NUMBER_BYTES:
            raise TooLarge(f"the JSON has more than {MAX_NUMBER_BYTES} bytes of numbers; send fewer or shorter numbers")

    def _outside_strings(self, data: bytes) -> bytes:
        """Return ``data`` without its strings. Once escapes are removed, each remaining quote opens or closes one."""
        if self._escaped:
            data = data[1:]
        if b"\\" in data:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        self._escaped = data.endswith(b"\\")
        self._quotes += data.count(b'"')
        if self._quotes > 2 * (self._most_commas + 2 * MAX_ELEMENTS):
            raise TooLarge("the JSON has too many strings; send fewer")
        pieces = data.split(b'"')
        outside = b"".join(pieces[int(self._quoted) :: 2])
        self._quoted ^= len(pieces) % 2 == 0
        return outside


def count_elements(text: str) -> None:
    """Check a JSON text that arrived inside a string. Raises ``TooLarge``."""
    ElementCounter().feed(text.encode("utf-8", "replace"))
