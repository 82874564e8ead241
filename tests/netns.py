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
        return subprocess.run(self.inside(*argv), timeout=timeout, capture_output=True, text=True, **options)

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start and return; whatever still runs when the namespaces go is killed."""
        return subprocess.Popen(self.inside(*argv), text=True, **options)

    def unplug(self) -> None:
        """Pull the cable: packets vanish, no connection is closed."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def plug(self) -> None:
        ip("-n", self.switch, "link", "set", self.port, "up")

    def inside(self, *argv: str) -> list[str]:
        """Return the command that runs another one on this host."""
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


@contextlib.contextmanager
def two_cables(slow_mbit: int) -> Iterator[tuple[Host, Host]]:
    """Two hosts with two cables between them: eth0 (10.77.0.x) lets through ``slow_mbit`` Mbit/s, eth1 (10.78.0.x) all.

    The switch of the first host is its own namespace, and its port is eth1: ``unplug`` cuts that cable.
    """
    prefix = f"macpipe-{os.getpid()}-{secrets.token_hex(3)}"
    hosts = tuple(Host(f"{prefix}-{n}", f"10.77.0.{n}", f"{prefix}-{n}", "eth1") for n in (1, 2))
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        for number, cable in enumerate(("eth0", "eth1")):
            other = ("type", "veth", "peer", "name", cable, "netns", hosts[1].namespace)
            ip("-n", hosts[0].namespace, "link", "add", cable, *other)
            for end, host in enumerate(hosts, 1):
                ip("-n", host.namespace, "addr", "add", f"10.{77 + number}.0.{end}/24", "dev", cable)
                ip("-n", host.namespace, "link", "set", cable, "up")
        for host in hosts:
            shape = f"qdisc add dev eth0 root tbf rate {slow_mbit}mbit burst 64kbit latency 400ms"
            host.run("tc", *shape.split(), check=True)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            remove(host.namespace)


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


AVAHI = """
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir /run/avahi-daemon
echo "hosts: files mdns4_minimal [NOTFOUND=return] dns" > /run/nsswitch.conf
mount --bind /run/nsswitch.conf /etc/nsswitch.conf
printf '[server]\\nuse-ipv6=no\\nenable-dbus=no\\n[publish]\\npublish-workstation=no\\n' > /run/avahi.conf
exec avahi-daemon --file /run/avahi.conf --no-drop-root --no-chroot --no-rlimits
"""
"""A host's own avahi-daemon, in a mount namespace whose resolver asks it for names in .local. It needs no D-Bus."""


@dataclass(frozen=True)
class MdnsHost:
    """A host with avahi-daemon (``pid``) and libnss-mdns: programs there resolve names in .local as a desktop does."""

    pid: int

    def run(self, *argv: str, timeout: float = WAIT_S) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--net", *argv]
        return subprocess.run(inside, timeout=timeout, capture_output=True, text=True)

    def addresses_of(self, name: str) -> list[str]:
        """Return what ``getaddrinfo`` says; nothing if it knows no address."""
        found = self.run("getent", "ahostsv4", name).stdout.splitlines()
        return sorted({line.split()[0] for line in found})


def has_mdns() -> bool:
    """Return whether this machine has avahi-daemon and libnss-mdns."""
    return bool(shutil.which("avahi-daemon") and list(Path("/").glob("lib/*/libnss_mdns4_minimal.so.2")))


@contextlib.contextmanager
def mdns(host: Host) -> Iterator[MdnsHost]:
    """Run avahi-daemon on a host during the block. Skips where avahi-daemon or libnss-mdns is missing."""
    if not has_mdns():
        pytest.skip("resolving CLUSTER.local as a desktop does needs avahi-daemon and libnss-mdns")
    with host.start("unshare", "--mount", "sh", "-c", AVAHI, stderr=subprocess.DEVNULL) as daemon:
        try:
            yield MdnsHost(daemon.pid)
        finally:
            daemon.kill()


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


@pytest.fixture
def two_cabled_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a slow and a fast cable between them; mark what uses it ``netns``."""
    if reason := missing() or ("" if shutil.which("tc") else "shaping a link needs the command tc (iproute2)"):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_cables(slow_mbit=50))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine refuses network namespaces or shaping: {error.stderr}")
        yield hosts
