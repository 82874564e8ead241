"""What a person decided when starting a worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """``port`` 0 takes a free one. ``memory_limit`` is bytes for weights, caches and work; None takes the device's own.

    ``home`` is the folder where this worker's id and its parts of models are kept.
    """

    name: str
    home: Path
    cluster: str = "default"
    host: str = "127.0.0.1"
    port: int = 0
    memory_limit: int | None = None
