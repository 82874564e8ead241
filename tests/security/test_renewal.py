"""Certificate renewal: the holder keeps its key to itself, and a removed member gets none."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from cluster.core.errors import Busy, InvalidRequest, MemberNotFound
from cluster.security.certificate_renewal import is_due, renew_certificate
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request
from cluster.security.limits import MAX_LEAVES_VALID
from cluster.security.roles import Role
from cluster.standby.own_certificates import OwnCertificates
from parties import Lead

DAY_S = 86_400.0


@pytest.fixture
def lead(tmp_path: Path) -> Lead:
    return Lead.make(tmp_path)


def test_it_is_time_after_two_thirds() -> None:
    assert not is_due(0.0, 90.0, 60.0)
    assert is_due(0.0, 90.0, 60.1)


def test_a_coordinator_renews_its_own(lead: Lead) -> None:
    before = lead.admit_coordinator(now=time.time() - 70 * DAY_S)
    trust = lead.trust(Role.COORDINATOR)
    assert trust.serial == before.serial

    for _ in range(2):
        anyio.run(OwnCertificates(trust, ()).renew_by_any, ())
    assert trust.serial != before.serial
    assert (trust.keyring.party.role, trust.keyring.party.id) == (before.role, before.id)
    assert not is_due(*trust.validity, time.time())
    (member,) = lead.members.current()
    assert [one.serial for one in member.issued] == [before.serial, trust.serial]


def test_a_key_stays_where_it_was_made_and_is_used_for_its_own_certificate_alone(lead: Lead, tmp_path: Path) -> None:
    lead.admit_coordinator()
    ada = lead.admit_worker("ada", tmp_path)
    bob = lead.admit_worker("bob", tmp_path)
    renewal = lead.trust(Role.WORKER, "ada").renewal
    request = renewal.request()
    assert b"PRIVATE" not in request
    for wrong in (b"", b"x", renew_certificate(lead.folder, Role.WORKER, ada.id, make_request()[1], time.time())):
        with pytest.raises(InvalidRequest, match="not the certificate"):
            renewal.install(wrong)
    with pytest.raises(InvalidRequest, match="the new certificate is for"):
        renewal.install(renew_certificate(lead.folder, Role.WORKER, bob.id, request, time.time()))
    renewal.install(renew_certificate(lead.folder, Role.WORKER, ada.id, renewal.request(), time.time()))
    assert lead.trust(Role.WORKER, "ada").serial != ada.serial


def test_who_was_removed_gets_none_and_nobody_gets_more_than_can_be_revoked(lead: Lead, tmp_path: Path) -> None:
    ada = lead.admit_worker("ada", tmp_path)
    request = make_request()[1]
    for _ in range(MAX_LEAVES_VALID - 1):
        renew_certificate(lead.folder, Role.WORKER, ada.id, request, time.time())
    with pytest.raises(Busy, match="already has 8 valid certificates"):
        renew_certificate(lead.folder, Role.WORKER, ada.id, request, time.time())
    lead.members.remove("ada")
    assert len(lead.members.revoked()) == MAX_LEAVES_VALID
    with pytest.raises(MemberNotFound):
        renew_certificate(lead.folder, Role.WORKER, ada.id, request, time.time())


def test_two_processes_that_renew_at_once_leave_a_key_and_its_certificate(
    lead: Lead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = lead.admit_worker("ada", tmp_path)
    first, second = (lead.trust(Role.WORKER, "ada").renewal for _ in range(2))
    certificates = {
        renewal: renew_certificate(lead.folder, Role.WORKER, ada.id, renewal.request(), time.time())
        for renewal in (first, second)
    }
    both_checked, first_key, other_done = threading.Barrier(2), threading.Event(), threading.Event()
    write = ClusterFolder.write

    def write_slowly(folder: ClusterFolder, path: Path, content: bytes) -> None:
        if path.name == "key.pem":
            with suppress(threading.BrokenBarrierError):
                both_checked.wait(0.3)  # nobody comes while one holds the lock
            if threading.current_thread() is not slow:
                first_key.wait(0.3)
        write(folder, path, content)
        if path.name == "key.pem" and threading.current_thread() is slow:
            first_key.set()
            other_done.wait(0.3)

    monkeypatch.setattr(ClusterFolder, "write", write_slowly)
    slow = threading.Thread(target=first.install, args=(certificates[first],))
    slow.start()
    second.install(certificates[second])
    other_done.set()
    slow.join()
    assert lead.folder.keyring(Role.WORKER, "ada") is not None
