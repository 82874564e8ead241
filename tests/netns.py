"""Hosts for tests: Linux network namespaces on one Ethernet, each with an address, none with a way out.

The bridge has a namespace too, and every link is made inside of these, so that nothing touches the machine's own
interfaces. It needs root, Linux and ``ip``; without them the fixtures skip and say what is missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 20


@dataclass(frozen=True)
class Host:
    """One namespace. ``address`` is its IPv4 address on the common Ethernet (a /24); it has its own loopback."""

    namespace: str
    address: str
    switch: str
    port: str

    def run(self, *argv: str, timeout: float = WAIT_S, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return its output as text."""
        return subprocess.run(self._inside(*argv), timeout=timeout, capture_output=True, text=True, **options)

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start and return; whatever still runs when the namespaces go is killed."""
        return subprocess.Popen(self._inside(*argv), text=True, **options)

    def unplug(self) -> None:
        """Pull the cable: packets vanish, no connection is closed."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def plug(self) -> None:
        ip("-n", self.switch, "link", "set", self.port, "up")

    def _inside(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *argv]


def missing() -> str:
    """Why this machine can't have namespaces; nothing when it can try."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return "" if shutil.which("ip") else "network namespaces need the command ip (iproute2)"


def ip(*argv: str, check: bool = True) -> str:
    return subprocess.run(["ip", *argv], check=check, timeout=WAIT_S, capture_output=True, text=True).stdout


@contextlib.contextmanager
def ethernet(count: int = 3) -> Iterator[tuple[Host, ...]]:
    """``count`` hosts, 10.77.0.1 and on, on one Ethernet. Everything in it is gone when the block ends."""
    prefix = f"macpipe-{os.getpid()}-{secrets.token_hex(3)}"
    switch = f"{prefix}-switch"
    hosts = tuple(Host(f"{prefix}-{n}", f"10.77.0.{n}", switch, f"port-{prefix[-6:]}-{n}") for n in range(1, count + 1))
    namespaces = [switch, *(host.namespace for host in hosts)]
    try:
        for namespace in namespaces:
            ip("netns", "add", namespace)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            connect(host)
        yield hosts
    finally:
        for namespace in namespaces:
            remove(namespace)


def connect(host: Host) -> None:
    """A cable from the switch's port to the host's eth0."""
    cable = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    ip("-n", host.switch, "link", "add", host.port, *cable)
    ip("-n", host.switch, "link", "set", host.port, "master", "bridge")
    ip("-n", host.switch, "link", "set", host.port, "up")
    ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    ip("-n", host.namespace, "link", "set", "eth0", "up")
    ip("-n", host.namespace, "link", "set", "lo", "up")


def remove(namespace: str) -> None:
    """Kill its processes and remove it; a host that was never created is not an error."""
    for pid in ip("netns", "pids", namespace, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", namespace, check=False)


@pytest.fixture
def three_hosts() -> Iterator[tuple[Host, ...]]:
    """Three hosts on one Ethernet; mark what uses it ``netns``."""
    if reason := missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(ethernet(3))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine refuses network namespaces: {error.stderr.strip()}")
        yield hosts
