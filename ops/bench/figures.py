"""Prints a benchmark's result: a table, or one JSON object with machine, versions, medians and ratios."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median

PACKAGES = ("macpipe", "mlx", "mlx-lm", "grpcio")


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser


@dataclass(frozen=True)
class Figure:
    """Measurements of one quantity in ``unit``, one per round."""

    name: str
    unit: str
    rounds: Sequence[float]

    @property
    def median(self) -> float:
        return median(self.rounds)


def machine() -> dict[str, object]:
    """Describe the machine without naming it."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the measured packages; None for one that is not installed but runs from its sources."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def as_facts(
    key: str,
    figures: Sequence[Figure],
    ratios: Mapping[str, float],
    more: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return figures and ratios as an object for JSON. ``key`` names the medians; ratios and ``more`` have names."""
    return {
        key: {f.name: round(f.median, 4) for f in figures},
        **{name: round(ratio, 4) for name, ratio in ratios.items()},
        **(more or {}),
        "rounds": {f.name: [round(r, 4) for r in f.rounds] for f in figures},
        "machine": machine(),
        "versions": versions(),
    }


def print_figures(
    key: str,
    figures: Sequence[Figure],
    ratios: Mapping[str, float],
    as_json: bool,
    more: Mapping[str, object] | None = None,
) -> None:
    """Print figures and ratios; in JSON as ``as_facts`` has them."""
    if as_json:
        print(json.dumps(as_facts(key, figures, ratios, more)))
        return
    for f in figures:
        print(f"{f.name:24} {f.median:9.3f} {f.unit}   ({min(f.rounds):.3f} to {max(f.rounds):.3f})")
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:9.3f}")
    for name, fact in (more or {}).items():
        print(f"{name:24} {fact}")
