"""Prints frozen dataclasses as one JSON object on stdout."""

from __future__ import annotations

import json
from typing import Any

import typer

from cluster.core.json_types import to_json_types


def print_json(facts: Any) -> None:
    """Print ``facts`` as one JSON object on one line of stdout."""
    typer.echo(json.dumps(to_json_types(facts), ensure_ascii=False, allow_nan=False))
