"""Sizes in memory as people write them: ``24GiB``, ``24GB``, ``24000MiB``, or plain bytes."""

from __future__ import annotations

import re
from typing import Final

from cluster.errors import InvalidOption

_SIZE: Final = re.compile(
    r"(?P<number>[0-9]{1,18}(\.[0-9]{1,18})?)\s*(?P<prefix>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE
)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(written: str, option: str) -> int:
    """Bytes. ``24G`` and ``24GB`` are powers of ten, ``24GiB`` of two. Raises InvalidOption that names ``option``."""
    found = _SIZE.fullmatch(written.strip())
    base = 1024 if found and found["binary"] else 1000
    size = int(float(found["number"]) * base ** _POWERS[found["prefix"].lower()]) if found else 0
    if size <= 0:
        raise InvalidOption(f"{option} {written!r} is no size; write it like 24GiB", field=option.lstrip("-"))
    return size
