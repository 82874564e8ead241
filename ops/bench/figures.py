"""What every benchmark prints: a table for people, or one JSON object with machine, versions, medians and ratios."""

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
    """A parser with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser


@dataclass(frozen=True)
class Figure:
    """Measurements of one thing, one a round, in ``unit``."""

    name: str
    unit: str
    rounds: Sequence[float]

    @property
    def median(self) -> float:
        return median(self.rounds)


def machine() -> dict[str, object]:
    """Enough to judge a figure by; nothing that names the machine."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """The versions of what is measured; None for a package that runs from its source tree without being installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def print_figures(
    key: str,
    figures: Sequence[Figure],
    ratios: Mapping[str, float],
    as_json: bool,
    more: Mapping[str, object] | None = None,
) -> None:
    """``key`` names the medians in the JSON object; each ratio, and what is ``more``, stands under its own name."""
    if as_json:
        facts = {
            key: {f.name: round(f.median, 4) for f in figures},
            **{name: round(ratio, 4) for name, ratio in ratios.items()},
            **(more or {}),
            "rounds": {f.name: [round(r, 4) for r in f.rounds] for f in figures},
            "machine": machine(),
            "versions": versions(),
        }
        print(json.dumps(facts))
        return
    for f in figures:
        print(f"{f.name:24} {f.median:9.3f} {f.unit}   ({min(f.rounds):.3f} to {max(f.rounds):.3f})")
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:9.3f}")
    for name, fact in (more or {}).items():
        print(f"{name:24} {fact}")
