"""Every method of every service, called by every kind of party: allowed exactly where the access rules say so.

The methods are those of the protobuf descriptors, and the raw ones that ``cluster.transport`` names: a new one that has
no rule fails here.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection, reflection_pb2

import cluster.transport
from cluster.security.access_rules import RULES
from cluster.security.authority import Authority
from cluster.security.keyring import Keyring, make_request
from cluster.security.roles import Role
from cluster.security.trust import ChannelOptions, Trust
from cluster.transport.grpc_setup import bind, control_server
from cluster.transport.grpc_streams import DataServer
from cluster.v1 import authority_pb2, cluster_pb2, inference_pb2, leader_pb2, store_pb2, worker_pb2
from cluster.v1.authority_pb2_grpc import AuthorityServiceServicer, add_AuthorityServiceServicer_to_server
from cluster.v1.cluster_pb2_grpc import ClusterServiceServicer, add_ClusterServiceServicer_to_server
from cluster.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from cluster.v1.leader_pb2_grpc import LeaderServiceServicer, add_LeaderServiceServicer_to_server
from cluster.v1.store_pb2_grpc import StoreServiceServicer, add_StoreServiceServicer_to_server
from cluster.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from parties import Lead

FILES: tuple[FileDescriptor, ...] = (
    *(worker_pb2.DESCRIPTOR, store_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR, cluster_pb2.DESCRIPTOR),
    *(authority_pb2.DESCRIPTOR, leader_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR),
)
DAY_S = 86_400.0
DENIED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}


@dataclass(frozen=True)
class Method:
    """A method, and whether requests and answers are streams."""

    name: str
    asks: bool
    answers: bool

    @property
    def raw(self) -> bool:
        return self.name.startswith("/cluster.v1.StageService/")


def described() -> list[Method]:
    services = [service for file in FILES for service in file.services_by_name.values()]
    return [
        Method(f"/{service.full_name}/{m.name}", m.client_streaming, m.server_streaming)
        for service in services
        for m in service.methods
    ]


def raw() -> list[Method]:
    """Return the methods without protobuf, which ``cluster.transport`` names."""
    (folder,) = cluster.transport.__path__
    texts = [path.read_text() for path in Path(folder).glob("*.py")]
    names = sorted({name for text in texts for name in re.findall(r'"(/cluster\.v1\.\w+/\w+)"', text)})
    return [Method(name, name.endswith(("Feed", "Probe")), True) for name in names]


METHODS = [*described(), *raw()]


def test_every_method_has_a_rule_and_every_rule_a_method() -> None:
    assert len(raw()) == 4
    assert {m.name for m in METHODS} == RULES.keys()
    assert all(RULES.values())


class Nothing:
    """A data port without a stage."""

    def outbox(self, epoch: int, line: object, reader: int = 0) -> None:
        return None

    def received(self, message: bytes) -> None:
        raise AssertionError("nobody got as far as to send a frame")


class Ports:
    """A control port with every service, and a data port, on their own loop."""

    def __init__(self, trust: Trust) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.control = asyncio.run_coroutine_threadsafe(self._open(trust), self._loop).result(10)
        self._data = DataServer(trust, "127.0.0.1", 0, Nothing())
        self.data = self._data.port

    async def _open(self, trust: Trust) -> int:
        self._server = server = control_server(trust)
        add_WorkerServiceServicer_to_server(WorkerServiceServicer(), server)
        add_StoreServiceServicer_to_server(StoreServiceServicer(), server)
        add_InferenceServiceServicer_to_server(InferenceServiceServicer(), server)
        add_ClusterServiceServicer_to_server(ClusterServiceServicer(), server)
        add_LeaderServiceServicer_to_server(LeaderServiceServicer(), server)
        add_AuthorityServiceServicer_to_server(AuthorityServiceServicer(), server)
        add_HealthServicer_to_server(health.HealthServicer(), server)
        reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
        port = bind(server, trust, "127.0.0.1", 0)
        await server.start()
        return port

    def close(self) -> None:
        self._data.stop()
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def lead(tmp_path_factory: pytest.TempPathFactory) -> Lead:
    made = Lead.make(tmp_path_factory.mktemp("lead"))
    made.admit(Role.COORDINATOR, "lead", "c0" * 8)
    for role in (Role.WORKER, Role.CLIENT, Role.ADMIN):
        made.admit(role, role.value, "a1" * 8)
    return made


@pytest.fixture(scope="module")
def ports(lead: Lead) -> Iterator[Ports]:
    made = Ports(lead.trust(Role.COORDINATOR))
    yield made
    made.close()


def of_role(lead: Lead, role: Role) -> Keyring:
    keyring = lead.folder.keyring(role, role.value if role is Role.WORKER else "")
    assert keyring
    return keyring


def signed(authority: Authority, now: float, id: str = "e0" * 8) -> tuple[bytes, bytes]:  # noqa: A002
    """A key and an admin's certificate: whatever else is wrong with it, its role is not."""
    key, request = make_request()
    return key, authority.sign(request, Role.ADMIN, id, "eve", now)


def forged(lead: Lead) -> tuple[bytes, bytes]:
    """An admin's certificate of this cluster, by its names and its issuer, which another key has signed."""
    genuine = x509.load_pem_x509_certificate(of_role(lead, Role.ADMIN).certificate)
    key, request = make_request()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "eve")]))
        .issuer_name(genuine.issuer)
        .public_key(x509.load_pem_x509_csr(request).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(genuine.not_valid_before_utc)
        .not_valid_after(genuine.not_valid_after_utc)
    )
    for extension in genuine.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    from cryptography.hazmat.primitives.serialization import Encoding

    return key, builder.sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.PEM)


def revoked(lead: Lead) -> tuple[bytes, bytes]:
    key, certificate = signed(lead.authority, time.time())
    party = Keyring.of(lead.authority.certificate, certificate, key)
    lead.members.admit(party.party, party.not_after)
    lead.members.remove("eve")
    return key, certificate


def credentials(who: str, lead: Lead, tmp_path: Path) -> grpc.ChannelCredentials:
    """Return the credentials of ``who``. All know the cluster's authority; they differ in their own certificates."""
    anchor = lead.authority.certificate
    match who:
        case "plaintext":
            return grpc.local_channel_credentials()
        case "none":
            return grpc.ssl_channel_credentials(anchor)
        case "foreign CA":
            key, certificate = forged(lead)
        case "wrong cluster":
            key, certificate = signed(Lead.make(tmp_path).authority, time.time())
        case "expired":
            key, certificate = signed(lead.authority, time.time() - 100 * DAY_S)
        case "not yet valid":
            key, certificate = signed(lead.authority, time.time() + 10 * DAY_S)
        case "revoked":
            key, certificate = revoked(lead)
        case _:
            keyring = of_role(lead, Role(who))
            key, certificate = keyring.key, keyring.certificate
    return grpc.ssl_channel_credentials(anchor, key, certificate)


def outcome(channel: grpc.Channel, method: Method) -> grpc.StatusCode:
    """How a call ends, or begins: a stream that answers was let in."""
    kind = f"{'stream' if method.asks else 'unary'}_{'stream' if method.answers else 'unary'}"
    call = getattr(channel, kind)(method.name, None, None)
    request: Any = iter([b""]) if method.asks else b""
    try:
        answer = call(request, timeout=10)
        if method.answers:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as e:
        return e.code()
    return grpc.StatusCode.OK


def asked(who: str, lead: Lead, ports: Ports, tmp_path: Path) -> dict[str, grpc.StatusCode]:
    shown = credentials(who, lead, tmp_path)
    named: ChannelOptions = [("grpc.ssl_target_name_override", f"coordinator.{lead.authority.cluster_id}")]
    found = {}
    for port, mine in ((ports.control, False), (ports.data, True)):
        with grpc.secure_channel(
            f"127.0.0.1:{port}", shown, [*named, ("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            found |= {m.name: outcome(channel, m) for m in METHODS if m.raw is mine}
    return found


@pytest.mark.parametrize("who", ["none", "plaintext", "foreign CA", "wrong cluster", "expired", "not yet valid"])
def test_strangers_do_not_get_as_far_as_a_method(who: str, lead: Lead, ports: Ports, tmp_path: Path) -> None:
    found = asked(who, lead, ports, tmp_path)
    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}
    assert len(found) == len(RULES)


def test_the_revoked_are_refused_everywhere(lead: Lead, ports: Ports, tmp_path: Path) -> None:
    assert set(asked("revoked", lead, ports, tmp_path).values()) == {grpc.StatusCode.UNAUTHENTICATED}


@pytest.mark.parametrize("role", list(Role))
def test_each_role_may_what_the_rules_say(role: Role, lead: Lead, ports: Ports, tmp_path: Path) -> None:
    found = asked(role.value, lead, ports, tmp_path)
    let_in = {name for name, code in found.items() if code not in DENIED}
    assert let_in == {name for name, roles in RULES.items() if role in roles}
    assert {found[name] for name in found.keys() - let_in} == {grpc.StatusCode.PERMISSION_DENIED}


def test_a_workers_mac_may_send_requests_and_look_but_change_nothing() -> None:
    """A new method does not become a worker's by being listed with those of clients."""
    client_side = ("cluster.v1.InferenceService/", "cluster.v1.ClusterService/", "grpc.")
    open_to_workers = {name[1:] for name, roles in RULES.items() if Role.WORKER in roles}
    assert {name.rpartition("/")[2] for name in open_to_workers if name.startswith(client_side)} == {
        *("Generate", "Chat", "Resume", "Trace", "Embed", "Tokenize", "ListModels", "Abort", "GetCluster"),
        *("Check", "List", "Watch"),
    }
