"""Layers as people write them: ``0-3,4-7``, one range a stage, both ends included."""

from __future__ import annotations

import re
from typing import Final

from cluster.errors import InvalidOption
from cluster.limits import MAX_STAGES
from cluster.types import LayerRange

_RANGE: Final = re.compile(r"\s*(?P<first>[0-9]{1,6})\s*(-\s*(?P<last>[0-9]{1,6})\s*)?")


def parse_layers(written: str) -> tuple[LayerRange, ...]:
    """One range a stage, from layer 0 on without a gap. Raises InvalidOption that names the bad part."""
    if written.count(",") >= MAX_STAGES:
        raise InvalidOption(f"--layers names more than {MAX_STAGES} stages", field="layers")
    ranges: list[LayerRange] = []
    for part in written.split(","):
        due, found = ranges[-1].end if ranges else 0, parse_range(part)
        if found.start != due:
            raise _wrong(part, f"must begin with layer {due}: the ranges start at 0 and leave no gap")
        ranges.append(found)
    return tuple(ranges)


def parse_range(part: str) -> LayerRange:
    """One range, anywhere. Raises InvalidOption."""
    found = _RANGE.fullmatch(part)
    if not found:
        raise _wrong(part, "is no range; write --layers like 0-3,4-7")
    first, last = int(found["first"]), int(found["last"] or found["first"])
    if last < first:
        raise _wrong(part, "ends before it begins")
    return LayerRange(first, last + 1)


def _wrong(part: str, why: str) -> InvalidOption:
    return InvalidOption(f"--layers: {part.strip()[:64]!r} {why}", field="layers")
