"""Which coordinator a client calls when none is named: what was remembered, and what is announced."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from cluster.client import AsyncClient, Client, coordinator_search
from cluster.client.coordinator_search import find_coordinator
from cluster.core.errors import InvalidOption
from cluster.discovery.coordinator_announcement import GRPC_SERVICE, announce_coordinator, read_coordinator_sighting
from cluster.discovery.interfaces import interfaces
from cluster.discovery.sighting import Sighting
from cluster.platform.paths import short_host_name
from cluster.security.cluster_choice import (
    choose_worker_name,
    remember_cluster,
    remember_coordinator,
    remembered_coordinator,
    resolve_cluster,
)
from cluster.security.credentials import open_caller_trust
from cluster.security.roles import Role
from parties import Lead

ID, OTHER_ID = "0123456789abcdef", "fedcba9876543210"
DAMAGED = (b"", b"{", b"[]", b'{"cluster": 5}', b'{"cluster": "../x"}', pytest.param(b"x" * 5000, id="oversized"))


@pytest.fixture
def lead(tmp_path: Path) -> Lead:
    """The Mac that leads the cluster ``studio``, with the certificates that ``init`` makes."""
    made = Lead.make(tmp_path / "mac-1", "studio")
    made.admit(Role.COORDINATOR, "mac-1-coordinator", ID)
    made.admit(Role.ADMIN, "mac-1-admin", ID)
    return made


@pytest.fixture
def home(lead: Lead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of another Mac, which is a worker of the cluster."""
    lead.admit(Role.WORKER, "mac-2", OTHER_ID, tmp_path / "mac-2")
    for name in ("MACPIPE_COORDINATOR", "MACPIPE_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "mac-2"))
    return tmp_path / "mac-2"


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[str]:
    """Present the certificate in ``folder`` to whoever connects, and yield the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = server.accept()
                with contextlib.suppress(OSError), plain, context.wrap_socket(plain, server_side=True) as caller:
                    caller.recv(1)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def test_the_cluster_is_the_named_one_else_the_last_one_entered(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_cluster(None, home) == "default"
    remember_cluster(home, "studio")
    assert resolve_cluster(None, home) == "studio"
    assert resolve_cluster("lab", home) == "lab"
    monkeypatch.setenv("MACPIPE_CLUSTER", "shop")
    assert resolve_cluster(None, home) == "shop"
    monkeypatch.delenv("MACPIPE_CLUSTER")
    remember_cluster(home, "left")
    assert resolve_cluster(None, home) == "default", "this Mac is not in it"


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_counts_as_none(home: Path, content: bytes) -> None:
    (home / "last-cluster.json").write_bytes(content)
    (home / "clusters" / "studio" / "coordinator.json").write_bytes(content.replace(b"cluster", b"address"))
    assert resolve_cluster(None, home) == "default"
    assert remembered_coordinator(home, "studio") is None


def test_a_client_uses_what_was_remembered(home: Path) -> None:
    remember_cluster(home, "studio")
    assert Client().address == "127.0.0.1:7700"
    remember_coordinator(home, "studio", "10.0.0.5:7712")
    assert Client().address == AsyncClient().address == "10.0.0.5:7712"
    with Client("10.0.0.6") as named:
        assert named.address == "10.0.0.6:7700", "a named coordinator is not looked for"


def test_a_worker_calls_as_a_worker(home: Path) -> None:
    assert open_caller_trust(home, "studio").me == f"worker.{OTHER_ID}"
    assert open_caller_trust(home, "default").me == ""


def test_a_coordinator_that_proves_itself_is_used_where_it_was(home: Path, lead: Lead) -> None:
    with listening(lead.folder.party(Role.COORDINATOR)) as address:
        assert find_coordinator(home, "studio", address) == address
        assert remembered_coordinator(home, "studio") is None


def test_a_coordinator_that_moved_is_found_by_its_announcement(home: Path, lead: Lead) -> None:
    """Another server of the cluster at the old address, and one that only claims to be the coordinator, are refused."""
    remember_cluster(home, "studio")

    async def use() -> str:
        cluster_id = lead.authority.cluster_id
        with (
            listening(lead.folder.party(Role.ADMIN)) as other,
            listening(lead.folder.party(Role.COORDINATOR)) as address,
        ):
            remember_coordinator(home, "studio", other)
            async with (
                announce_coordinator(cluster_id=cluster_id, host="127.0.0.1", port=int(other.split(":")[1])),
                announce_coordinator(cluster_id=cluster_id, host="127.0.0.1", port=int(address.split(":")[1])),
                AsyncClient() as client,
            ):
                assert client.address == address
                return address

    assert asyncio.run(use()) == remembered_coordinator(home, "studio")


def test_an_address_that_refuses_does_not_end_the_search(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    home = lead.folder.home
    with listening(lead.folder.party(Role.COORDINATOR)) as address:
        monkeypatch.setattr(coordinator_search, "DEFAULT_COORDINATOR_PORT", int(address.split(":")[1]))
        assert find_coordinator(home, "studio", "127.0.0.1:1") == address
        assert remembered_coordinator(home, "studio") == address, "even the Mac that leads remembers where it was found"


LONG = {b"id": ID.encode(), **{b"%d" % n: b"y" * 200 for n in range(11)}}


@pytest.mark.parametrize("properties", [{}, {b"id": None}, {b"id": b"0123"}, {b"id": b"\xff" * 16}, LONG])
def test_a_malformed_announcement_is_no_sighting(properties: dict[bytes, bytes | None]) -> None:
    def sighting(properties: dict[bytes, bytes | None]) -> Sighting | None:
        name = f"coordinator.{GRPC_SERVICE}"
        info = AsyncServiceInfo(GRPC_SERVICE, name, 7700, properties=properties, parsed_addresses=["127.0.0.1"])
        return read_coordinator_sighting(info, interfaces())

    assert sighting({b"id": ID.encode()}) == Sighting("127.0.0.1:7700", cluster=ID)
    assert sighting(properties) is None


def test_a_worker_has_the_name_of_this_machines_membership(lead: Lead, home: Path) -> None:
    assert choose_worker_name(None, home, "studio") == "mac-2"
    assert choose_worker_name("mac-2", home, "studio") == "mac-2"
    assert choose_worker_name(None, home, "other") == short_host_name()
    assert choose_worker_name("eve", home, "other") == "eve"
    lead.admit(Role.WORKER, "mac-3", "00112233aabbccdd", home)
    for unknown in (None, "eve", ""):
        with pytest.raises(InvalidOption, match="is a worker of cluster studio as mac-2 and mac-3, not as"):
            choose_worker_name(unknown, home, "studio")
