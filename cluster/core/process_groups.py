"""What the processes of a group need to find each other: addresses, and the RDMA devices between their Macs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MAX_RDMA_PORTS: Final = 8
"""Thunderbolt ports of a Mac; the largest has six."""
_DEVICE: Final = re.compile(r"rdma_en\d{1,3}")


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A Thunderbolt port over which RDMA works: its device, and the ids that macOS gives both ends of the cable."""

    device: str
    own: str
    peer: str


@dataclass(frozen=True, slots=True)
class GroupPort:
    """The port on which a worker's engine will listen for the other ranks of its group, and its Mac's RDMA ports."""

    number: int
    rdma_ports: tuple[RdmaPort, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupAddresses:
    """Where the ranks of a group listen, by rank, and MLX's backend that connects them.

    ``devices`` are for RDMA: of each rank, its device towards each rank; "" towards itself, and where there is none.
    """

    hosts: tuple[str, ...]
    backend: str
    devices: tuple[tuple[str, ...], ...] = ()


def is_rdma_device(name: str) -> bool:
    """Return whether macOS could name an RDMA device so."""
    return bool(_DEVICE.fullmatch(name))
