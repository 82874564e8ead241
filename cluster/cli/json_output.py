"""Prints frozen dataclasses as one JSON object on stdout. Layer ranges are ``[start, end)`` pairs."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

import typer

from cluster.core.plan import LayerRange


def print_json(facts: Any) -> None:
    """Print ``facts`` as one JSON object on one line of stdout."""
    typer.echo(json.dumps(to_json_types(facts), ensure_ascii=False, allow_nan=False))


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
