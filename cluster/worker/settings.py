"""The settings with which a person starts a worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cluster.platform.logs import LogLevel


class Profiling(StrEnum):
    """When a worker measures its speed: if no profile is stored, at every start, or never (its speed is unknown)."""

    KEPT = "kept"
    NEW = "new"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Settings of one worker.

    An empty ``host`` is loopback, and in a cluster this machine's best address. ``port`` and ``data_port`` 0 take free
    ports. ``memory_limit`` is in bytes, for weights, caches and work; None takes the device's limit. ``home`` is the
    folder of this worker's id, profile and parts of models. ``interface`` is the one that ``host`` belongs to, if a
    person named it. ``throttle`` slows the worker down by a factor, for tests.
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
    every_address: bool = False
    """Whether the data port listens on this machine's other addresses, too: in a cluster, if no person named one."""
    prefix_disk: int = 0
    """Maximum bytes of prefixes on disk; 0 keeps none there."""
    standby: bool = True
    """Keep a second engine process ready, so that a dead one is replaced at once."""
    rdma: bool = True
    """Let groups use RDMA where it works."""
    log_level: LogLevel = LogLevel.INFO


def worker_folder(home: Path, worker: str) -> Path:
    """Return the folder of a worker's state."""
    return home / "workers" / worker


def prefix_folder(home: Path, worker: str) -> Path:
    """Return the folder of a worker's prefixes on disk."""
    return worker_folder(home, worker) / "prefixes"
