"""Trust: alone a machine talks to itself; in a cluster to the dialled party, until it is removed."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cluster.core.errors import ClockWrong, InvalidOption, Unreachable
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import LocalTrust, open_trust
from cluster.security.keyring import make_request
from cluster.security.mtls import ClusterTrust
from cluster.security.revocations import Revocations
from cluster.security.roles import Role
from cluster.security.trust import ADMIN, CLIENT, COORDINATOR, WORKER
from cluster.transport.grpc_setup import data_channel
from cluster.transport.grpc_streams import DataServer, GrpcDialer
from cluster.transport.streams import Line, Outbox
from parties import Lead, shown_by

ROOT = Path(__file__).resolve().parents[2]
ADA, BOB = "ada", "bob"


class OneStage:
    """Holds epoch 1 and sends messages to whoever pulls."""

    def __init__(self) -> None:
        self.urgent = Outbox(1)
        self.fed: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        return self.urgent if (epoch, line) == (1, Line.URGENT) else None

    def received(self, message: bytes) -> None:
        self.fed.put(message)


@pytest.fixture
def lead(tmp_path: Path) -> Lead:
    made = Lead.make(tmp_path)
    made.admit_coordinator()
    for name in (ADA, BOB):
        made.admit_worker(name, tmp_path)
    return made


@pytest.fixture
def stage(lead: Lead) -> Iterator[tuple[OneStage, str]]:
    """Ada's data port."""
    held = OneStage()
    server = DataServer(lead.trust(Role.WORKER, ADA), "127.0.0.1", 0, held)
    yield held, f"127.0.0.1:{server.port}"
    server.stop()


def test_no_port_and_no_channel_is_without_credentials() -> None:
    sources = {p: p.read_text() for p in (ROOT / "cluster").rglob("*.py") if not p.name.endswith("_pb2_grpc.py")}
    assert not [p for p, text in sources.items() if re.search(r"insecure_(port|channel)", text)]
    made = [p.relative_to(ROOT).as_posix() for p, text in sources.items() if re.search(r"\b(grpc|aio)\.server\(", text)]
    assert made == ["cluster/transport/grpc_setup.py"]
    dialled = [p.relative_to(ROOT).as_posix() for p, text in sources.items() if ".secure_channel" in text]
    assert sorted(dialled) == [
        *("cluster/client/async_calls.py", "cluster/client/calls.py", "cluster/transport/grpc_setup.py")
    ]
    credentials = re.compile(r"grpc\.(local|ssl|dynamic_ssl)_\w*credentials\(")
    givers = [p.relative_to(ROOT).as_posix() for p, text in sources.items() if credentials.search(text)]
    assert sorted(givers) == ["cluster/security/credentials.py", "cluster/security/mtls.py"]


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::", "mac-1.local", "fd00::5"])  # noqa: S104
def test_alone_a_machine_speaks_with_itself(host: str) -> None:
    trust = LocalTrust("home")
    for refused in (lambda: trust.server(host), lambda: trust.channel(host, WORKER)):
        with pytest.raises(InvalidOption, match=r"`macpipe init --cluster home`.*`macpipe join TOKEN --cluster home`"):
            refused()
    trust.server("127.0.0.1")
    trust.channel("::1", WORKER)


def test_a_machine_is_in_a_cluster_as_what_it_holds_there(lead: Lead, tmp_path: Path) -> None:
    assert open_trust(tmp_path, "default", COORDINATOR).me == lead.trust(Role.COORDINATOR).me
    assert open_trust(tmp_path, "default", ADMIN, CLIENT).me == ""
    assert open_trust(tmp_path, "default", WORKER, name=ADA).me.startswith("worker.")
    assert open_trust(tmp_path, "default", WORKER, name="cyd").me == ""
    assert open_trust(tmp_path, "other", COORDINATOR).me == ""


def test_the_party_that_was_meant_must_answer(lead: Lead, stage: tuple[OneStage, str]) -> None:
    held, address = stage
    dialer = GrpcDialer(lead.trust(Role.COORDINATOR))
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    ada, bob = (lead.trust(Role.WORKER, name).me for name in (ADA, BOB))
    for peer in (ada, WORKER):
        feed = dialer.feed(address, 1, lost.put, peer=peer)
        feed.send(peer.encode())
        assert held.fed.get(timeout=5) == peer.encode()
        feed.close()
    with (
        data_channel(lead.trust(Role.COORDINATOR), address, bob) as channel,
        pytest.raises(grpc.RpcError, match="Hostname Verification"),
    ):
        channel.unary_unary("/cluster.v1.StageService/Probe", None, None)(b"", timeout=5)


def test_an_open_pull_ends_once_its_party_is_revoked(lead: Lead, stage: tuple[OneStage, str], tmp_path: Path) -> None:
    held, address = stage
    bob = lead.trust(Role.WORKER, BOB)
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    GrpcDialer(bob).pull(address, 1, heard.put, lost.put)
    held.urgent.send(b"one")
    assert heard.get(timeout=5) == b"one"
    Revocations(lead.folder, ADA).learn({bob.serial})
    began = time.monotonic()
    assert "broke" in lost.get(timeout=20)
    print(f"ended after {time.monotonic() - began:.2f} s")
    with pytest.raises(Unreachable, match="bob was removed from this cluster"):
        GrpcDialer(bob).pull(address, 1, heard.put, lost.put)
    again = Revocations(lead.folder, ADA)
    assert again.known() == {bob.serial}
    again.learn(())
    assert Revocations(lead.folder, ADA).known() == {bob.serial}, "a coordinator that does not know of it tells nothing"


def test_a_renewed_certificate_is_shown_without_a_restart(lead: Lead, stage: tuple[OneStage, str]) -> None:
    _, address = stage
    before = shown_by(lead, address)
    key, request = make_request()
    trust = lead.trust(Role.WORKER, ADA)
    certificate = lead.authority.sign(request, Role.WORKER, trust.keyring.party.id, ADA, time.time())
    ClusterFolder(lead.folder.home, "default").keep(Role.WORKER, ADA, key=key, certificate=certificate)
    assert shown_by(lead, address) == trust.serial != before


def test_a_certificate_that_is_not_valid_now_is_named_before_anybody_is_dialled(lead: Lead) -> None:
    keyring = lead.folder.keyring(Role.COORDINATOR)
    assert keyring
    late = ClusterTrust(lead.folder, keyring, clock=lambda: keyring.not_after + 1)
    with pytest.raises(ClockWrong, match="this Mac's clock says"):
        late.channel("127.0.0.1", WORKER)
    shown = {"x509_pem_cert": [keyring.certificate]}
    assert ClusterTrust(lead.folder, keyring).party(shown) == keyring.party
    assert late.party(shown) is None


def test_who_shows_nothing_or_nonsense_is_nobody(lead: Lead) -> None:
    trust = lead.trust(Role.COORDINATOR)
    http = lead.authority.sign_http(make_request()[1], ["mac-1.local", "10.0.0.5"], time.time())
    for pem in (b"", b"no certificate", b"x" * 1_000_000, http):
        assert trust.party({"x509_pem_cert": [pem]}) is None
    assert trust.party({}) is None
