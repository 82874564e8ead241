"""Durations as people write them: ``90s``, ``30m``, ``1h``, ``2d``."""

from __future__ import annotations

import re
from typing import Final

from cluster.errors import InvalidOption

_DURATION: Final = re.compile(r"(?P<number>\d{1,9}(\.\d{1,3})?)\s*(?P<unit>[smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration(written: str, option: str) -> float:
    """Seconds; raises ``InvalidOption`` that names ``option``."""
    found = _DURATION.fullmatch(written.strip().lower())
    if not found:
        raise InvalidOption(f"{option} {written!r} is no duration; write it like 30m or 2h", field=option.lstrip("-"))
    return float(found["number"]) * _SECONDS[found["unit"]]


def duration_in_words(seconds: float) -> str:
    """``59 min``, ``2 h``, ``3 days``: as much as a person wants to know of a wait."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if round(seconds / size) >= 2:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
