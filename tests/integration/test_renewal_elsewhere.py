"""The authority's Mac renews certificates while another Mac leads: real processes, each with its own state folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.coordinator.identity import hold_identity
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request, read_certificate
from cluster.security.roles import Party, Role
from integration.daemons import Daemon, free_port, launch, until
from integration.test_authority_move import Mac
from integration.test_joining import macpipe
from parties import Lead

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]
CLUSTER, DAY_S = "default", 86_400.0


class Member:
    """A member, the folder of its Mac, and the authority that certifies it."""

    def __init__(self, lead: Lead, home: Path, party: Party) -> None:
        self._lead, self._folder, self._party = lead, ClusterFolder(home, CLUSTER), party

    def age(self) -> None:
        """Replace its certificate by one that was issued 80 days ago, so that it is due, and ends in ten."""
        key, request = make_request()
        party = self._party
        certificate = self._lead.authority.sign(request, party.role, party.id, party.name, time.time() - 80 * DAY_S)
        self._lead.members.renew(*read_certificate(certificate))
        with self._folder.lock():
            self._folder.keep(party.role, party.name, key=key, certificate=certificate)

    @property
    def days_left(self) -> float:
        """For how long the certificate on its Mac is valid."""
        held = self._folder.keyring(self._party.role, self._party.name)
        assert held
        return (held.not_after - time.time()) / DAY_S


@contextmanager
def worker(folder: Path, name: str, port: int) -> Iterator[None]:
    log = folder / f"{name}.log"
    here = ["--name", name, "--home", str(folder / name), "--host", "127.0.0.1", "--port", str(port)]
    daemon = Daemon(name, launch(["worker", *here, "--cluster", CLUSTER, "--profile", "off", "--no-standby"], log), log)
    try:
        daemon.wait_for("of cluster")
        yield
    finally:
        daemon.stop()


def test_the_leaders_and_a_workers_certificate_are_renewed_by_the_standby_with_the_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Mac(tmp_path, "mac-1"), Mac(tmp_path, "mac-2")
    lead = Lead.make(first.home, CLUSTER)
    lead.admit_coordinator("mac-1-coordinator")
    with hold_identity(second.home, CLUSTER) as own_id:
        party = lead.admit(Role.COORDINATOR, "mac-2-coordinator", own_id, second.home)
    leader = Member(lead, second.home, party)
    ada = Member(lead, tmp_path / "ada", lead.admit_worker("ada", tmp_path / "ada"))
    at_first, at_second, port = f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}", free_port()
    monkeypatch.setenv("MACPIPE_HOME", str(first.home))

    def leadership() -> dict[str, object]:
        return dict(json.loads(macpipe("status", "--json", "--coordinator", at_second))["leadership"])

    serving = ("faq", "--workers", "1", "--wait", "60", "--replicate", "sync", "--peer", f"127.0.0.1:{port}")
    with worker(tmp_path, "ada", port), first.serve(*serving) as authority:
        authority.wait_for("leader: serving")
        with second.serve("--standby", "--coordinator", at_first) as heir:
            until(lambda: '"in_sync": true' in macpipe("status", "--json", "--coordinator", at_first))
            macpipe("handover", "mac-2", "--coordinator", at_first)
            heir.wait_for("leader: serving")
            authority.wait_for("standby: following leader=mac-2-coordinator")
            assert not ClusterFolder(second.home, CLUSTER).holds_authority
            for member in (leader, ada):
                member.age()
                assert member.days_left < 11
            until(lambda: leader.days_left > 89 and ada.days_left > 89)
            heir.wait_for("certificates: renewed own certificate")
            heir.wait_for("certificates: renewed worker=ada")
            assert "certificates: renewed" not in authority.said(), "it leads nobody, and its own one is not due"
            assert authority.said().count("leader: serving") == 1
            assert macpipe("generate", "-p", "A hop is", "--max-tokens", "3", "--coordinator", at_second)
            assert leadership()["role"] == "leader"
