"""Validates the fields of an untrusted frame header, and packs token ids and numbers as bytes."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from math import isnan
from typing import Any

from cluster.core.errors import BadFrame

_MAX_COUNT = 2**63 - 1
_IDS = "I" if array("I").itemsize == 4 else "L"


class Fields:
    """A list of exactly ``count`` fields. Each accessor checks one field and raises ``BadFrame``, which names it."""

    __slots__ = ("_value", "_what")

    def __init__(self, value: Any, what: str, count: int) -> None:
        if type(value) is not list or len(value) != count:
            raise BadFrame(f"a frame's {what} is not a list of {count} fields")
        self._value: list[Any] = value
        self._what = what

    def _bad(self, i: int, wanted: str) -> BadFrame:
        return BadFrame(f"field {i} of a frame's {self._what} is not {wanted}")

    def count(self, i: int) -> int:
        """Return a whole number from 0 to 2^63 - 1."""
        value = self._value[i]
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            raise self._bad(i, "a whole number")
        return value

    def seed(self, i: int) -> int:
        """Return an unsigned 64-bit number."""
        value = self._value[i]
        if type(value) is not int or not 0 <= value < 2**64:
            raise self._bad(i, "a seed of 64 bits")
        return value

    def number(self, i: int) -> float:
        """Return a number; integers are converted to float."""
        value = self._value[i]
        if type(value) not in (float, int):
            raise self._bad(i, "a number")
        return float(value)

    def flag(self, i: int) -> bool:
        """Return a boolean."""
        value = self._value[i]
        if type(value) is not bool:
            raise self._bad(i, "true or false")
        return value

    def text(self, i: int) -> str:
        """Return a string."""
        value = self._value[i]
        if type(value) is not str:
            raise self._bad(i, "text")
        return value

    def blob(self, i: int) -> bytes:
        """Return bytes."""
        value = self._value[i]
        if type(value) is not bytes:
            raise self._bad(i, "bytes")
        return value

    def rows(self, i: int, most: int) -> list[Any]:
        """Return a list of at most ``most`` entries."""
        value = self._value[i]
        if type(value) is not list or len(value) > most:
            raise self._bad(i, f"a list of at most {most}")
        return value

    def counts(self, i: int, most: int) -> tuple[int, ...]:
        """Return at most ``most`` whole numbers."""
        value = self.rows(i, most)
        if not all(type(n) is int and 0 <= n <= _MAX_COUNT for n in value):
            raise self._bad(i, "a list of whole numbers")
        return tuple(value)

    def optional_list(self, i: int) -> list[Any] | None:
        """Return a list or None."""
        value = self._value[i]
        if value is not None and type(value) is not list:
            raise self._bad(i, "a list or nothing")
        return value


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return token ids as little-endian u32."""
    packed = array(_IDS, ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """Return the token ids that ``pack_ids`` packed. Raises ``BadFrame`` unless the length is a multiple of four."""
    if len(data) % 4:
        raise BadFrame(f"token ids have {len(data)} bytes, which is not a multiple of 4")
    ids = array(_IDS, data)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)


def pack_numbers(numbers: Iterable[float]) -> bytes:
    """Return numbers as little-endian float32."""
    packed = array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_numbers(data: bytes) -> tuple[float, ...]:
    """Return the numbers that ``pack_numbers`` packed. Raises ``BadFrame`` for a NaN or an incomplete number."""
    if len(data) % 4:
        raise BadFrame(f"numbers have {len(data)} bytes, which is not a multiple of 4")
    packed = array("f", data)
    if sys.byteorder == "big":
        packed.byteswap()
    numbers = tuple(packed)
    if any(map(isnan, numbers)):
        raise BadFrame("a frame has a log-probability that is not a number")
    return numbers
