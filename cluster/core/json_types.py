"""Convert frozen dataclasses to JSON types. Layer ranges become ``[start, end)`` pairs."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

from cluster.core.plan import LayerRange


def to_json_types(value: Any) -> Any:
    """Convert ``value`` to JSON types. NaN and infinity, which JSON lacks, become null."""
    match value:
        case LayerRange():
            return [value.start, value.end]
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: to_json_types(one) for key, one in value.items()}
        case list() | tuple():
            return [to_json_types(one) for one in value]
        case _ if is_dataclass(value):
            return {field.name: to_json_types(getattr(value, field.name)) for field in fields(value)}
    return value
