"""``CLUSTER.local`` as a desktop uses it: a host with avahi-daemon and libnss-mdns asks three Macs over HTTPS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from netns import ROOT, has_mdns, missing

PLAY = """
import json, sys, time
from pathlib import Path

from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyStore
from faults.coordinator_fleet import CLUSTER, CoordinatorFleet
from faults.hosts import inside
from netns import ethernet, mdns


def play(hosts, client):
    fleet = CoordinatorFleet(Path(sys.argv[1]), hosts, http="0.0.0.0:8080")
    try:
        ask_by_name(fleet, client)
    finally:
        fleet.close()


def ask_by_name(fleet, client):
    shared = ClusterFolder(fleet.macs[0].home, CLUSTER)
    _, key = KeyStore(shared).create("desktop")
    fleet.mend()
    body = json.dumps({"model": "default", "prompt": "What is a hop?", "max_tokens": 3})
    url = f"https://{CLUSTER}.local:8080/v1/completions"
    ask = ["curl", "-sS", "-m", "3", "--cacert", str(shared.authority), "-H", f"Authorization: Bearer {key}"]
    with mdns(client) as desktop:
        def answered():
            found = desktop.run(*ask, "-H", "Content-Type: application/json", "-d", body, url)
            return '"choices"' in found.stdout or print(found.stdout[-300:], found.stderr[-300:], file=sys.stderr)

        end = time.monotonic() + 60
        while not answered():
            assert time.monotonic() < end, "the leader does not answer by its name"
        before = desktop.addresses_of(f"{CLUSTER}.local")
        assert before == [fleet.leader.host.address], before
        fleet.leader.host.unplug()
        pulled = time.monotonic()
        while not answered():
            assert time.monotonic() < pulled + 60, fleet.said()
        print(json.dumps({"seconds": time.monotonic() - pulled, "now": desktop.addresses_of(f"{CLUSTER}.local")}))


with ethernet(4) as (*hosts, client), inside(client):
    play(hosts, client)
"""


@pytest.mark.netns
@pytest.mark.long
@pytest.mark.timeout(400)
def test_requests_to_the_clusters_name_go_on_after_the_leaders_cable_was_pulled(tmp_path: Path) -> None:
    """In a process of its own, which enters a namespace with all of its threads."""
    if reason := missing() or ("" if has_mdns() else "needs avahi-daemon and libnss-mdns"):
        pytest.skip(reason)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [sys.executable, "-c", PLAY, str(tmp_path)]
    played = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=380)
    assert played.returncode == 0, played.stderr
    moved = json.loads(played.stdout)
    assert moved["now"] == ["10.77.0.2"]
