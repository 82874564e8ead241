"""Layer ranges as people write them: ``0-3,4-7``, both ends included."""

from __future__ import annotations

import re

from cluster.errors import InvalidOption
from cluster.types import LayerRange

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def parse_layers(text: str) -> tuple[LayerRange, ...]:
    """The ranges, which must begin at 0 and leave no gap. Raises ``InvalidOption`` naming the part that is wrong."""
    ranges: list[LayerRange] = []
    for part in text.split(","):
        ranges.append(_parsed(part.strip(), text))
        due = ranges[-2].end if len(ranges) > 1 else 0
        if ranges[-1].start != due:
            raise InvalidOption(f"--layers {text}: {part.strip()} should begin at layer {due}", field="layers")
    return tuple(ranges)


def _parsed(part: str, text: str) -> LayerRange:
    found = _RANGE.fullmatch(part)
    if not found:
        raise InvalidOption(f"--layers {text}: {part!r} is not a range such as 0-3", field="layers")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise InvalidOption(f"--layers {text}: {part} ends before it begins", field="layers")
    return LayerRange(first, last + 1)
