"""What was read from one Mac before anything is judged. Plain values, so recorded ones can be judged in tests."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.discovery.interfaces import Interface
from cluster.platform.mac_commands import MacOutputs
from cluster.platform.macos import parse_version


class Reached(StrEnum):
    """How an attempt to connect to a member ended."""

    CONNECTED = "connected"
    REFUSED = "refused"
    TIMED_OUT = "timed out"
    NO_ROUTE = "no route to host"
    UNKNOWN_HOST = "unknown host"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class MemberConnection:
    """A real connection to another member: its name, its address, and how it ended."""

    name: str
    host: str
    port: int
    reached: Reached


@dataclass(frozen=True, slots=True)
class CertificateReading:
    """A certificate of this Mac. Times are seconds since the epoch.

    ``damage`` says why it cannot be used; empty if it can.
    """

    cluster: str
    role: str
    name: str = ""
    not_before: float = 0.0
    not_after: float = 0.0
    damage: str = ""


@dataclass(frozen=True, slots=True)
class ProfileReading:
    """A worker's stored measurement: when it was stored, in seconds since the epoch, and for which circumstances."""

    worker: str
    written: float
    key: str
    disturbed: str = ""
    """What disturbed the measurement, in words; "" if nothing did."""


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """A running process of macpipe, such as ``cluster.worker.engine``."""

    pid: int
    parent: int
    module: str


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of packages; empty if one is not installed. ``mlx_targets`` are the wheel's tags, like macosx_14_0."""

    macpipe: str = ""
    python: str = ""
    mlx: str = ""
    mlx_lm: str = ""
    mlx_targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Readings:
    """Everything that was read from one Mac. Sizes are in bytes, times in seconds since the epoch."""

    system: str
    """Darwin or Linux."""
    now: float
    outputs: MacOutputs = field(default_factory=MacOutputs)
    versions: Versions = field(default_factory=Versions)
    disk_path: str = ""
    disk_free: int | None = None
    interfaces: tuple[Interface, ...] = ()
    multicast: bool | None = None
    """Whether a multicast socket could be opened; None if that was not tried."""
    connections: tuple[MemberConnection, ...] = ()
    busy_ports: tuple[int, ...] = ()
    """Default ports of the coordinator on which some process listens."""
    certificates: tuple[CertificateReading, ...] = ()
    profiles: tuple[ProfileReading, ...] = ()
    processes: tuple[ProcessReading, ...] | None = None

    @property
    def is_mac(self) -> bool:
        return self.system == "Darwin"

    @property
    def macos(self) -> tuple[int, ...]:
        """The version of macOS, such as (26, 2); empty if it is not known."""
        version = parse_version(self.outputs.release)
        return tuple(map(int, version.split("."))) if version else ()


def reached_of(error: OSError) -> Reached:
    """Classify a failed connection."""
    if isinstance(error, TimeoutError):
        return Reached.TIMED_OUT
    if isinstance(error, ConnectionRefusedError):
        return Reached.REFUSED
    return Reached.NO_ROUTE if error.errno == errno.EHOSTUNREACH else Reached.FAILED
