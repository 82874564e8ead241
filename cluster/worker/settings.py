"""What a person decided when starting a worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Profiling(StrEnum):
    """When a worker measures itself: where nothing is kept, always at its start, or never (its speed is unknown)."""

    KEPT = "kept"
    NEW = "new"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """``host`` empty is loopback, and in a cluster this machine's best address. ``port`` and ``data_port`` 0 take free
    ones. ``memory_limit`` is bytes for weights, caches and work; None takes
    the device's own.

    ``home`` is the folder where this worker's id, profile and parts of models are kept. ``interface`` is the one that
    ``host`` is an address of, where a person named it. ``throttle`` makes it slower by a factor, for tests.
    """

    name: str
    home: Path
    cluster: str = "default"
    host: str = ""
    port: int = 0
    memory_limit: int | None = None
    profile: Profiling = Profiling.KEPT
    interface: str = ""
    throttle: float = 1.0
    data_port: int = 0
    standby: bool = True
    """Keep a second engine process in waiting, so that one that dies is replaced at once."""
