"""Hosts for the Macs of a fleet: network namespaces, whose cables can be pulled, or addresses of this machine."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from netns import Host, ethernet

_CLONE_NEWNET = 0x40000000


class FleetHost(Protocol):
    """Where the processes of a Mac run, and listen at ``address``."""

    @property
    def address(self) -> str: ...

    def inside(self, *argv: str) -> list[str]:
        """Return the command that runs another one on this host."""

    def unplug(self) -> None:
        """Cut the host off from the others. Raises ``NotImplementedError`` where that is impossible."""

    def plug(self) -> None:
        """Connect the host again. Nothing happens if it is connected."""


@dataclass(frozen=True)
class LoopbackHost:
    """An address of this machine's loopback, which needs no rights. It has no cable."""

    address: str

    def inside(self, *argv: str) -> list[str]:
        return [*argv]

    def unplug(self) -> None:
        raise NotImplementedError("loopback has no cable; network namespaces have one")

    def plug(self) -> None:
        pass


@contextmanager
def separate_hosts(count: int) -> Iterator[Sequence[FleetHost]]:
    """Yield hosts in namespaces. This thread, and those that it starts, are in one more during the block."""
    with ethernet(count + 1) as (*hosts, client), inside(client):
        yield hosts


@contextmanager
def loopback_hosts(count: int) -> Iterator[Sequence[FleetHost]]:
    """Yield hosts whose addresses no other process of this machine takes as long as each asks for its own."""
    own = os.getpid()
    yield [LoopbackHost(f"127.{1 + own // 250 % 250}.{1 + own % 250}.{n}") for n in range(1, count + 1)]


@contextmanager
def inside(host: Host) -> Iterator[None]:
    """Have this thread, and those that it starts, open their sockets in the namespace of ``host`` during the block."""
    with Path("/proc/thread-self/ns/net").open() as outside:
        with Path(f"/run/netns/{host.namespace}").open() as namespace:
            _enter(namespace.fileno())
        try:
            yield
        finally:
            _enter(outside.fileno())


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")
