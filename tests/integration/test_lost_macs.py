"""A Mac dies with its coordinator, which leads, and its worker: the next leader shows both until they are removed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.client import Client
from cluster.security.roles import Role
from integration.daemons import Daemon, command, free_port, launch, until, wait_serving
from integration.test_standby import kill
from parties import Lead

pytestmark = [pytest.mark.long, pytest.mark.timeout(240), pytest.mark.xdist_group("faults")]


class Mac:
    """A Mac of a cluster, on loopback, with a worker and a coordinator of its name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.home, self._folder = name, folder / name, folder
        self.port, self.worker_port = free_port(), free_port()
        self.daemons: list[Daemon] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_worker(self) -> None:
        own = ["--name", f"{self.name}-worker", "--port", str(self.worker_port), "--profile", "off", "--no-standby"]
        self._start("worker", "worker", *own)

    def serve(self, *options: str) -> Daemon:
        return self._start("serve", "serve", *options, "--port", str(self.port), "--http", "off", "--join-port", "0")

    def _start(self, what: str, *words: str) -> Daemon:
        log = self._folder / f"{self.name}-{what}.log"
        here = ["--home", str(self.home), "--cluster", "default", "--host", "127.0.0.1"]
        daemon = Daemon(self.name, launch([*words, *here], log), log)
        self.daemons.append(daemon)
        return daemon


@pytest.fixture
def macs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Mac, Mac]]:
    """Two Macs: ``mac-2`` leads, and ``mac-1``, which has the authority, stands by and is in sync."""
    first, second = Mac(tmp_path, "mac-1"), Mac(tmp_path, "mac-2")
    lead = Lead.make(first.home)
    lead.admit(Role.ADMIN, "tests", "ad" * 8)
    lead.admit_coordinator("mac-1")
    lead.admit(Role.COORDINATOR, "mac-2", "b" * 16, second.home)
    monkeypatch.setenv("MACPIPE_HOME", str(first.home))
    peers = ["--peers-only"]
    for mac in (first, second):
        lead.admit_worker(f"{mac.name}-worker", mac.home)
        peers += ["--peer", f"127.0.0.1:{mac.worker_port}"]
    try:
        for mac in (first, second):
            mac.start_worker()
        leader = first.serve("faq", "--workers", "2", "--wait", "90", "--replicate", "sync", *peers)
        wait_serving(first.address, leader)
        second.serve("--standby", "--coordinator", first.address, *peers)
        until(lambda: in_sync(first))
        with Client(first.address, timeout_s=20) as client:
            client.hand_over()
        until(lambda: in_sync(second))
        yield first, second
    finally:
        for daemon in (*first.daemons, *second.daemons):
            if daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait(10)


def run(*words: str) -> str:
    """Return what a command prints on ``mac-1``; nothing if it fails."""
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def status(mac: Mac) -> dict[str, Any]:
    text = run("status", "--coordinator", mac.address, "--json")
    found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
    return found


def standbys(mac: Mac) -> list[dict[str, Any]] | None:
    """Return the standbys of this Mac while it leads; else None."""
    led = status(mac).get("leadership") or {}
    leader = led.get("leader") or {}
    return led["standbys"] if leader.get("name") == mac.name else None


def in_sync(leader: Mac) -> bool:
    """Return whether this Mac leads, and the other one has all that clients saw."""
    return [one["in_sync"] for one in standbys(leader) or ()] == [True]


def test_a_mac_that_is_lost_is_shown_until_it_is_removed(macs: tuple[Mac, Mac]) -> None:
    first, second = macs
    kill(*second.daemons)
    until(lambda: [(one["name"], one["silent_seconds"] > 0) for one in standbys(first) or ()] == [("mac-2", True)])
    shown = {worker["name"]: worker["standing"] for worker in status(first)["workers"]}
    assert shown == {"mac-1-worker": "up", "mac-2-worker": "gone"}
    text = run("status", "--coordinator", first.address)
    assert "standby: mac-2 at " in text
    assert "lost: it has not answered for" in text
    assert "worker mac-2-worker has not answered since this coordinator leads" in text
    assert "mac-2-worker: \n" not in text, "nothing is known of its Mac"
    run("remove", "mac-2")
    until(lambda: standbys(first) == [])
    run("remove", "mac-2-worker")
    until(lambda: [worker["name"] for worker in status(first)["workers"]] == ["mac-1-worker"])
    assert "lost" not in run("status", "--coordinator", first.address)
    assert "leader: stepped down reason=handover term=1 leader=mac-2" in first.daemons[1].said()
