"""Values in packed bytes, counted before they become objects: the unpacker bounds each list, and not all together."""

from __future__ import annotations

from typing import Final

from cluster.core.errors import BadFrame
from cluster.core.limits import MAX_HEADER_ELEMENTS

_SIZES: Final = {
    **dict.fromkeys((0xCC, 0xD0), 2), **dict.fromkeys((0xCD, 0xD1, 0xDC), 3),
    **dict.fromkeys((0xCA, 0xCE, 0xD2, 0xDD), 5), **dict.fromkeys((0xCB, 0xCF, 0xD3), 9),
}  # fmt: skip
"""Bytes of a number by its first byte, and of a list's head."""
_LENGTHS: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Bytes of the length that follows the first byte of bytes and of a text."""
_SHORT_TEXT: Final = range(0xA0, 0xC0)


def require_few_elements(header: memoryview) -> None:
    """Raise ``BadFrame`` where msgpack bytes hold more than MAX_HEADER_ELEMENTS values.

    Short headers cannot, and are not looked at. What is no msgpack of ours may be counted wrong after its first fault,
    where the unpacker stops.
    """
    if len(header) <= MAX_HEADER_ELEMENTS:
        return
    at = count = 0
    while at < len(header):
        count += 1
        if count > MAX_HEADER_ELEMENTS:
            raise BadFrame(f"a frame's header holds more than {MAX_HEADER_ELEMENTS} values")
        first = header[at]
        if first in _SHORT_TEXT:
            at += 1 + (first & 0x1F)
        elif width := _LENGTHS.get(first):
            at += 1 + width + int.from_bytes(header[at + 1 : at + 1 + width], "big")
        else:
            at += _SIZES.get(first, 1)
