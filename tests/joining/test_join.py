"""A Mac joins over real sockets: what it gets, whom it trusts, and that a stranger in between learns nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from cluster.core.errors import (
    ClockWrong,
    DuplicateName,
    ForeignAuthority,
    InvalidOption,
    InvalidRequest,
    NoCluster,
    TokenRefused,
    Unreachable,
)
from cluster.core.text import parse_address
from cluster.joining import client
from cluster.joining import join_port as port
from cluster.joining.client import JoinOrder, join
from cluster.joining.join_messages import read_refusal, read_reply, read_request
from cluster.joining.join_port import admit_macs
from cluster.joining.join_service import GuessLimiter
from cluster.security.admission import Admission
from cluster.security.cluster_creation import create_cluster
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import open_caller_trust
from cluster.security.keyring import make_request
from cluster.security.limits import MAX_JOIN_VALUES, MAX_JOINS
from cluster.security.members import require_roster
from cluster.security.roles import Role

pytestmark = pytest.mark.anyio
IDS = {Role.COORDINATOR: "c" * 16, Role.WORKER: "a" * 16, Role.ADMIN: "d" * 16}
Mac = Any


async def test_a_mac_joins_and_keeps_its_key_to_itself(
    address: str, admission: Admission, mac: Mac, caplog: pytest.LogCaptureFixture
) -> None:
    order = mac.order(admission, address)
    joined = await join(order)
    assert (joined.cluster, joined.party.name, joined.party.role) == ("lab", "mac-2", Role.WORKER)
    assert (joined.party.id, joined.warning) == (mac.id, "")
    assert abs(joined.clock_ahead_s) < 5
    folder = ClusterFolder(mac.home, "lab")
    ring = folder.keyring(Role.WORKER, "mac-2")
    assert ring is not None
    assert ring.party == joined.party
    assert admission.members.admits(ring.party)
    assert not folder.holds_authority
    for path in folder.path.parent.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert list((mac.home / "clusters" / ".joining").iterdir()) == []
    assert "join: admitted name=mac-2" in caplog.text
    for secret in (order.token.secret.hex(), order.token.text, "PRIVATE KEY"):
        assert secret not in caplog.text


@pytest.mark.parametrize("role", [Role.CLIENT, Role.ADMIN])
async def test_a_mac_joins_to_ask(address: str, admission: Admission, mac: Mac, role: Role) -> None:
    await join(mac.order(admission, address, role))
    caller = ClusterFolder(mac.home, "lab").caller()
    assert caller is not None
    assert caller.party.role is role


async def test_a_mac_joins_to_coordinate(address: str, admission: Admission, folder: ClusterFolder, mac: Mac) -> None:
    joined = await join(replace(mac.order(admission, address, Role.COORDINATOR), name="mac-2-coordinator"))
    own = ClusterFolder(mac.home, "lab")
    assert (own.coordinates, own.holds_authority) == (True, False)
    trust = open_caller_trust(mac.home, "lab")
    assert trust.me == f"coordinator.{joined.party.id}"
    with pytest.raises(NoCluster, match="has no list of the members"):
        require_roster(trust.members, "lab")
    own.write(own.members, folder.members.read_bytes())
    require_roster(trust.members, "lab")
    assert trust.members is not None
    assert trust.members.admits(joined.party)
    with pytest.raises(InvalidOption, match=r"holds the cluster's authority.*`macpipe authority move NAME`"):
        admission.members.remove("mac-1-coordinator")
    with pytest.raises(InvalidOption, match="this Mac's own coordinator"):
        trust.members.remove("mac-2-coordinator")
    admission.members.remove("mac-2-coordinator")
    own.write(own.members, folder.members.read_bytes())
    assert trust.revoked(joined.party.serial)


async def test_a_cluster_may_have_another_name_here(address: str, admission: Admission, mac: Mac) -> None:
    assert (await join(mac.order(admission, address, cluster="work"))).cluster == "work"
    assert ClusterFolder(mac.home, "work").exists


async def test_another_cluster_of_the_name_is_not_written_over(address: str, admission: Admission, mac: Mac) -> None:
    create_cluster(ClusterFolder(mac.home, "lab"), "mac-2", IDS)
    order = mac.order(admission, address)
    with pytest.raises(InvalidOption, match=r"in another cluster under the name lab.*--cluster NAME"):
        await join(order)
    assert (await join(replace(order, cluster="lab-2"))).cluster == "lab-2", "the token is as good as before"


async def test_a_mac_that_missed_the_answer_asks_again_with_its_key(
    address: str, admission: Admission, mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = mac.order(admission, address)
    with monkeypatch.context() as patch:
        patch.setattr(client, "read_reply", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            await join(order)
    assert not ClusterFolder(mac.home, "lab").exists
    (kept,) = (mac.home / "clusters" / ".joining").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    joined = await join(order)
    assert admission.members.admits(joined.party)
    assert len(admission.members.current()) == 4
    with pytest.raises(TokenRefused, match="was used by mac-2"):
        await join(order)


async def test_a_taken_name_is_told(address: str, admission: Admission, mac: Mac) -> None:
    order = mac.order(admission, address)
    with pytest.raises(DuplicateName, match=r"has a member named mac-1 \(worker\).*--name"):
        await join(replace(order, name="mac-1"))
    assert (await join(order)).party.name == "mac-2"


async def test_nobody_there_is_told(admission: Admission, mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unreachable, match=r"no coordinator admits Macs at 127\.0\.0\.1:1:"):
        await join(mac.order(admission, "127.0.0.1:1"))
    monkeypatch.setattr(client, "JOIN_TRY_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unreachable, match="did not answer within"):
        await join(mac.order(admission, f"127.0.0.1:{silent.getsockname()[1]}"))


# A stranger in between


class Stranger:
    """A TLS server of somebody's that answers what it likes and keeps every byte that it is sent."""

    def __init__(self, chain: Path, answer: Callable[[bytes], bytes]) -> None:
        self.heard: list[bytes] = []
        self.failed = 0
        self._answer = answer
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(chain / "certificate.pem", chain / "key.pem")

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard = b""
        while b"\r\n\r\n" not in heard and (piece := await reader.read(65536)):
            heard += piece
        self.heard.append(heard)
        body = self._answer(heard)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def stranger(chain: Path, answer: Callable[[bytes], bytes]) -> AsyncIterator[tuple[Stranger, str]]:
    one = Stranger(chain, answer)
    server = await asyncio.start_server(one, "127.0.0.1", 0, ssl=one.context)
    try:
        yield one, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def nothing_was_told(heard: list[bytes], order: JoinOrder) -> None:
    assert [one.partition(b" HTTP")[0] for one in heard] == [b"GET /authority"]
    said = b"".join(heard)
    words = (
        order.token.secret.hex(),
        order.token.id,
        order.token.text[5:],
        "CERTIFICATE REQUEST",
        order.name,
        order.id,
    )
    for secret in words:
        assert secret.encode() not in said


async def test_a_stranger_with_another_authority_is_told_nothing(
    tmp_path: Path, admission: Admission, mac: Mac
) -> None:
    other = ClusterFolder(tmp_path / "other", "lab")
    create_cluster(other, "mac-1", IDS)
    order = mac.order(admission, "")
    async with stranger(other.party(Role.COORDINATOR), lambda _: other.authority.read_bytes()) as (one, where):
        with pytest.raises(
            ForeignAuthority, match=r"is not the coordinator that issued this token.*no secret was sent"
        ):
            await join(replace(order, peer=where))
    nothing_was_told(one.heard, order)
    assert not (mac.home / "clusters").exists(), "not even a key was made"


async def test_a_stranger_that_shows_the_right_authority_is_told_nothing(
    tmp_path: Path, folder: ClusterFolder, admission: Admission, mac: Mac
) -> None:
    """Everybody can show the authority's certificate; only the coordinator has one that it signed."""
    other = ClusterFolder(tmp_path / "other", "lab")
    create_cluster(other, "mac-1", IDS)
    order = mac.order(admission, "")
    async with stranger(other.party(Role.COORDINATOR), lambda _: folder.authority.read_bytes()) as (one, where):
        with pytest.raises(ForeignAuthority, match=r"right authority but is not its coordinator.*no secret was sent"):
            await join(replace(order, peer=where))
    nothing_was_told(one.heard, order)


async def test_a_member_that_plays_the_coordinator_is_told_nothing(
    tmp_path: Path, folder: ClusterFolder, admission: Admission, mac: Mac
) -> None:
    """A worker of the same cluster, whose certificate is valid and names its true role."""
    order = mac.order(admission, "")
    worker = folder.party(Role.WORKER, "mac-1")
    async with stranger(worker, lambda _: folder.authority.read_bytes()) as (one, where):
        with pytest.raises(ForeignAuthority, match=r"is not its coordinator \(.*[Hh]ostname mismatch"):
            await join(replace(order, peer=where))
    nothing_was_told(one.heard, order)


@pytest.mark.parametrize("answer", [b"", b"{}", b"x" * 200_000, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END"])
async def test_what_is_no_authority_is_refused(
    folder: ClusterFolder, admission: Admission, mac: Mac, answer: bytes
) -> None:
    order = mac.order(admission, "")
    async with stranger(folder.party(Role.COORDINATOR), lambda _: answer) as (one, where):
        with pytest.raises((ForeignAuthority, Unreachable)) as refused:
            await join(replace(order, peer=where))
    assert where in refused.value.sentence
    nothing_was_told(one.heard, order)


# Clocks


async def test_a_clock_that_differs_is_named(address: str, admission: Admission, mac: Mac) -> None:
    joined = await join(mac.order(admission, address, clock=lambda: time.time() + 600))
    assert joined.warning == "this Mac's clock is 10 min ahead of the coordinator's; set the one that is wrong"


async def test_a_clock_that_is_days_behind_is_an_error_that_spends_nothing(
    address: str, admission: Admission, mac: Mac
) -> None:
    order = mac.order(admission, address, clock=lambda: time.time() - 3 * 86_400)
    with pytest.raises(ClockWrong, match=r"this Mac's clock is 3 days behind the coordinator's.*the same token"):
        await join(order)
    await join(replace(order, clock=time.time))


async def test_a_coordinator_whose_certificate_is_not_valid_yet_is_diagnosed(
    tmp_path: Path, mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS itself fails here: the sentence has the two clocks, and not OpenSSL's words alone."""

    def later() -> float:
        return time.time() + 3 * 86_400

    ahead = ClusterFolder(tmp_path / "ahead", "lab")
    create_cluster(ahead, "mac-1", IDS, later)
    admission = Admission(ahead, later)
    monkeypatch.setattr(port, "JoinService", lambda _: port_service(admission, later))
    async with admit_macs(ahead, "127.0.0.1", 0) as where:
        with pytest.raises(ClockWrong, match="this Mac's clock is 3 days behind the coordinator's"):
            await join(mac.order(admission, where))
    assert admission.tokens.all_tokens()[0].used is None


def port_service(admission: Admission, clock: Callable[[], float]) -> Any:
    from cluster.joining.join_service import JoinService

    return JoinService(admission, clock)


# The port's bounds


async def talk(address: str, sent: bytes, wait_s: float = 5.0) -> bytes:
    """Send bytes over TLS that verifies nothing; all that comes back."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(*parse_address(address), ssl=context)
    try:
        writer.write(sent)
        async with asyncio.timeout(wait_s):
            return await reader.read()
    except ConnectionError:
        return b"cut"
    finally:
        writer.close()


def post(body: bytes, length: int | None = None) -> bytes:
    head = f"POST /join HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def reason(answer: bytes) -> str:
    error = read_refusal(answer.partition(b"\r\n\r\n")[2])
    return error.reason if error else answer.partition(b"\r\n")[0].decode()


async def test_bodies_and_paths_have_bounds(address: str) -> None:
    assert reason(await talk(address, post(b"x" * 70_000))) == "TOO_LARGE"
    for bad in (b"", b"{}", b"[" * 1000, b'{"token": "' + b"a" * 1000 + b'"}', b"\xff\xfe"):
        assert reason(await talk(address, post(bad))) == "INVALID_REQUEST"
    assert b" 404 " in await talk(address, b"GET /members HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b" 405 " in await talk(address, b"GET /join HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b" 400 " in await talk(address, b"nonsense\r\n\r\n")


async def test_a_body_longer_than_any_request_is_refused_unread(address: str) -> None:
    lists = b'{"name":[' + b"[]," * 10_000 + b"[]]}"  # 30 KB, each list of which costs the parser 2 us
    assert reason(await talk(address, post(lists))) == "TOO_LARGE"


NO_REFUSALS = {
    "deep": b"[" * 20_000,
    "deep error": b'{"error":' + b"[" * 20_000,
    "list": b"[]",
    "number": b'{"error": 1}',
}


@pytest.mark.parametrize("body", NO_REFUSALS.values(), ids=NO_REFUSALS)
def test_an_answer_that_is_no_refusal_is_none(body: bytes) -> None:
    assert read_refusal(body) is None


LONG_ASKS = {
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(MAX_JOIN_VALUES + 1)) + b"}",
    "lists": b'{"token":[' + b"[]," * MAX_JOIN_VALUES + b"[]]}",
    "depth": b"[" * (MAX_JOIN_VALUES + 1),
    "objects": b'{"csr":' * (MAX_JOIN_VALUES + 1),
}


@pytest.mark.parametrize("body", LONG_ASKS.values(), ids=LONG_ASKS)
def test_a_request_of_many_values_is_refused_before_it_is_parsed(body: bytes) -> None:
    """Parsing makes an error for each of them; 32 strangers at once kept the event loop for 1.5 s."""
    with pytest.raises(InvalidRequest, match="too many fields"):
        read_request(body)
    with pytest.raises(ValueError, match="too many fields"):
        read_reply(body)


def test_a_name_may_be_all_commas() -> None:
    fields = {"token": "ab" * 4, "secret": "ab" * 16, "csr": "x", "id": "ab" * 8, "name": "," * 63, "clock": 1.0}
    assert read_request(json.dumps(fields).encode()).name == fields["name"]


def test_a_wrong_field_is_named_and_not_repeated() -> None:
    from cluster.core.errors import InvalidRequest

    body = {"token": "0" * 8, "secret": "geheim", "csr": "", "id": "0" * 16, "name": "a", "clock": 1.0}
    with pytest.raises(InvalidRequest) as refused:
        read_request(json.dumps(body).encode())
    assert refused.value.field == "secret"
    assert "geheim" not in str(refused.value) + repr(refused.value.__cause__)


async def test_old_tls_is_refused(address: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(*parse_address(address), ssl=context)


async def test_who_is_slow_is_cut_off(
    folder: ClusterFolder, admission: Admission, mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a handshake. While MAX_JOINS connections are silent, one more is closed at once, and retries."""
    monkeypatch.setattr(port, "JOIN_S", 1.0)
    async with admit_macs(folder, "127.0.0.1", 0) as address:
        began = time.monotonic()
        slow = asyncio.create_task(talk(address, post(b"{", 100), 20))
        idle = [await asyncio.open_connection(*parse_address(address)) for _ in range(MAX_JOINS - 1)]
        reader, writer = await asyncio.open_connection(*parse_address(address))
        assert await reader.read() == b""
        writer.close()
        joined = await join(mac.order(admission, address))
        assert joined.party.name == "mac-2", "it tried again until there was room"
        for reader, writer in idle:
            assert await reader.read() == b""
            writer.close()
        assert await slow in (b"", b"cut")
        assert time.monotonic() - began < 15


def test_wrong_secrets_are_answered_at_a_rate() -> None:
    now = [0.0]
    guesses = GuessLimiter(5, lambda: now[0])
    assert [guesses.allow() for _ in range(7)] == [True] * 5 + [False] * 2
    now[0] = 0.5
    assert [guesses.allow() for _ in range(4)] == [True, True, False, False]
    now[0] = 1000.0
    assert [guesses.allow() for _ in range(7)].count(True) == 5


async def test_guesses_are_slowed_down_and_those_who_know_are_not(address: str, admission: Admission, mac: Mac) -> None:
    def ask(secret: str) -> bytes:
        csr = make_request()[1].decode()
        return post(
            json.dumps(
                {"token": "0" * 8, "secret": secret, "csr": csr, "id": "0" * 16, "name": "eve", "clock": time.time()}
            ).encode()
        )

    answers = [reason(await talk(address, ask(f"{n:032x}"))) for n in range(12)]
    assert answers[:5] == ["TOKEN_UNKNOWN"] * 5
    assert set(answers) <= {"TOKEN_UNKNOWN", "BUSY"}
    assert (await join(mac.order(admission, address))).party.name == "mac-2"


async def test_a_renewed_certificate_is_shown_without_a_restart(
    address: str, folder: ClusterFolder, admission: Admission
) -> None:
    def shown() -> bytes:
        return ssl.get_server_certificate(parse_address(address), timeout=5).encode()

    def serial(pem: bytes) -> int:
        from cryptography import x509

        return x509.load_pem_x509_certificate(pem).serial_number

    before = await anyio.to_thread.run_sync(shown)
    key, csr = make_request()
    fresh = admission.authority.sign(csr, Role.COORDINATOR, "c" * 16, "mac-1-coordinator", time.time())
    folder.keep(Role.COORDINATOR, "", key=key, certificate=fresh)
    assert serial(await anyio.to_thread.run_sync(shown)) == serial(fresh) != serial(before)


async def test_a_taken_port_is_named(address: str, folder: ClusterFolder) -> None:
    from cluster.core.errors import PortInUse

    with pytest.raises(PortInUse, match=r"cannot admit Macs on 127.0.0.1:.*--join-port"):
        async with admit_macs(folder, *parse_address(address)):
            pass
