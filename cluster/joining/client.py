"""A Mac joins: it finds the coordinator of its token, makes sure of it, and only then says its secret.

The first call is over TLS that verifies nothing, and asks for the authority's certificate, which everybody may have.
Where that is not the one that the token pins, nothing further is said. The second call trusts that authority alone,
and the name of its coordinator. The key is made here, stays here, and is kept until the answer has come, so that a Mac
that missed it asks again with the same one.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, TypeVar

import anyio
import httpx2

from cluster.core.errors import (
    Busy,
    ClockWrong,
    ForeignAuthority,
    InvalidOption,
    MacpipeError,
    TokenRefused,
    Unreachable,
)
from cluster.core.text import format_address, parse_address
from cluster.discovery.join_announcement import look_for_join
from cluster.joining.coordinator_search import search
from cluster.joining.join_forms import AUTHORITY, JOIN, JoinReply, JoinRequest, read_answer, read_refusal
from cluster.security.admission import clocks_in_words
from cluster.security.authority import Stranger, authority_of
from cluster.security.bounds import (
    CLOCKS_DIFFER_S,
    DEFAULT_JOIN_PORT,
    JOIN_RETRY_S,
    JOIN_S,
    JOIN_SEARCH_S,
    JOIN_TRY_S,
    MAX_JOIN_BYTES,
)
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request
from cluster.security.roles import Party, Role, name_of
from cluster.security.tokens import JoinToken

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JoinOrder:
    """How this Mac wants to join. ``cluster`` empty keeps the cluster under its own name, ``peer`` empty looks for it.

    ``id`` (16 hex digits) is what it wants to be known by; ``clock`` is this Mac's.
    """

    home: Path
    token: JoinToken
    id: str
    name: str
    peer: str = ""
    cluster: str = ""
    clock: Callable[[], float] = field(default=time.time)


@dataclass(frozen=True, slots=True)
class Joined:
    """As what, where its files are, and by how many seconds this Mac's clock is ahead of the coordinator's."""

    cluster: str
    party: Party
    address: str
    folder: Path
    clock_ahead_s: float

    @property
    def warning(self) -> str:
        """What to say of the clocks; empty where they agree well enough."""
        if abs(self.clock_ahead_s) <= CLOCKS_DIFFER_S:
            return ""
        return f"this Mac's clock is {clocks_in_words(self.clock_ahead_s)} the coordinator's; set the one that is wrong"


@dataclass(frozen=True, slots=True)
class Shown:
    """What an address showed before anything was said to it: its authority, and its clock if it told one (hearsay)."""

    address: str
    authority: Stranger
    clock: float | None


async def join(order: JoinOrder) -> Joined:
    """Become a member; raises ``MacpipeError``. Everything that it waits for has an end."""
    shown = await _find_pinned(order)
    folder = ClusterFolder(order.home, order.cluster or shown.authority.cluster)
    if folder.exists and folder.authority.read_bytes() != shown.authority.certificate:
        raise InvalidOption(
            f"this Mac is in another cluster that it calls {folder.cluster}; keep this one under another name with"
            f" --cluster NAME, or remove {folder.path}",
            field="cluster",
        )
    pending = order.home / "clusters" / ".joining" / f"{order.token.id}.pem"
    key, csr = _request(folder, pending)
    try:
        answer = await _request_admission(order, shown, csr)
    except TokenRefused:
        pending.unlink(missing_ok=True)  # no answer will come for this key
        raise
    now = order.clock()
    party = _keep(order, folder, shown.authority, key, answer)
    pending.unlink(missing_ok=True)
    return Joined(folder.cluster, party, shown.address, folder.path, now - answer.clock)


async def fetch_authority(address: str) -> Shown:
    """Who answers at ``address``, by its own word; raises ``Unreachable``, ``ForeignAuthority``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what is asked for is public, and pinned
    async with _call(address, context, JOIN_TRY_S) as caller:
        response, body = await caller("GET", AUTHORITY)
    try:
        if response.status_code != httpx2.codes.OK:
            raise ValueError(f"it answers with {response.status_code}")
        return Shown(address, authority_of(body), _date(response))
    except ValueError as e:
        raise ForeignAuthority(f"who answers at {address} is no macpipe coordinator that admits Macs ({e})") from e


async def _find_pinned(order: JoinOrder) -> Shown:
    """The coordinator that the token was made by, found or named."""

    async def look(address: str) -> Shown:
        shown = await fetch_authority(address)
        if shown.authority.fingerprint != order.token.fingerprint:
            raise ForeignAuthority(
                f"{address} is not the coordinator that this token is from: its cluster is"
                f" {shown.authority.cluster_id}, the token's {order.token.cluster_id}; it was told nothing"
            )
        return shown

    if order.peer:
        address = _address(order.peer)
        return await _again_if_cut(lambda: look(address))
    async with look_for_join(order.token.cluster_id) as source:
        return await search(source, look, order.token.cluster_id, JOIN_SEARCH_S)


class _Cut(Unreachable):
    """Somebody answered, and hung up: a join port that is full does."""


async def _again_if_cut(call: Callable[[], Awaitable[T]]) -> T:
    """What ``call`` returns, which is tried again for a while where the port is full or the line was cut."""
    end = anyio.current_time() + JOIN_SEARCH_S
    while True:
        try:
            return await call()
        except (_Cut, Busy):
            if anyio.current_time() + JOIN_RETRY_S >= end:
                raise
        await anyio.sleep(JOIN_RETRY_S)


async def _request_admission(order: JoinOrder, shown: Shown, csr: bytes) -> JoinReply:
    """Post the request, again where the port is full or the line was cut: the same key gets the same answer."""
    ask = JoinRequest(
        token=order.token.id,
        secret=order.token.secret.hex(),
        csr=csr.decode(),
        id=order.id,
        name=order.name,
        clock=max(0.0, order.clock()),
    )
    return await _again_if_cut(lambda: _post(order, shown, ask))


async def _post(order: JoinOrder, shown: Shown, ask: JoinRequest) -> JoinReply:
    context = ssl.create_default_context(cadata=shown.authority.certificate.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    name = name_of(Role.COORDINATOR, shown.authority.cluster_id)
    try:
        async with _call(shown.address, context, JOIN_S, name) as caller:
            response, body = await caller("POST", JOIN, ask.model_dump_json().encode())
    except ssl.SSLCertVerificationError as e:
        raise _why_unverified(e, shown, order.clock()) from None
    if response.status_code != httpx2.codes.OK:
        raise read_refusal(body) or Unreachable(f"{shown.address} answers with {response.status_code}")
    try:
        return read_answer(body)
    except ValueError as e:
        raise Unreachable(f"{shown.address}: {e}") from e


def _keep(order: JoinOrder, folder: ClusterFolder, authority: Stranger, key: bytes, answer: JoinReply) -> Party:
    """Write what was got, once it is what was asked for."""
    certificate = answer.certificate.encode()
    try:
        ring = Keyring.of(authority.certificate, certificate, key)
        if (ring.party.role, ring.party.cluster_id) != (order.token.role, authority.cluster_id):
            raise ValueError("it is for another role or cluster")
    except ValueError as e:
        raise ForeignAuthority(f"the coordinator's certificate for this Mac cannot be used: {e}") from e
    ring.check_clock(order.clock())
    folder.keep(ring.party.role, ring.party.name, key=key, certificate=certificate)
    folder.write(folder.authority, authority.certificate)  # last: from now on this Mac is in the cluster
    return ring.party


def _request(folder: ClusterFolder, pending: Path) -> tuple[bytes, bytes]:
    """A key and a request for it; the key of a try with the same token whose answer never came, where there is one."""
    with suppress(OSError, ValueError):
        return make_request(pending.read_bytes())
    key, csr = make_request()
    folder.write(pending, key)
    return key, csr


def _why_unverified(error: ssl.SSLCertVerificationError, shown: Shown, now: float) -> MacpipeError:
    """Why the coordinator's certificate does not do, where a clock may be the cause."""
    if error.verify_code not in _CLOCK_CODES:
        return ForeignAuthority(
            f"{shown.address} shows the right authority and is not its coordinator ({error.verify_message}); it was"
            " told nothing"
        )
    ahead = 0.0 if shown.clock is None else now - shown.clock
    if abs(ahead) > CLOCKS_DIFFER_S:
        return ClockWrong(
            f"this Mac's clock is {clocks_in_words(ahead)} the coordinator's, whose certificate is not valid at that"
            " time; set it, and join again with the same token"
        )
    return ClockWrong(
        f"the coordinator's certificate is not valid now ({error.verify_message}); start `macpipe serve` there, which"
        " renews it, or set both clocks"
    )


_LATE_S: Final = 0.5
"""The library's own timeouts, which bound each step, close its socket; cancelling it in a handshake does not."""
_CLOCK_CODES: Final = frozenset({9, 10})
"""X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED."""


@asynccontextmanager
async def _call(address: str, context: ssl.SSLContext, seconds: float, name: str = "") -> AsyncIterator[_Caller]:
    """Calls to ``address`` that last ``seconds`` at most; ``name`` is whom the certificate must be for."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            httpx2.AsyncClient(verify=context, trust_env=False, timeout=seconds, base_url=f"https://{address}")
        )
        yield _Caller(client, address, seconds, name)


class _Caller:
    def __init__(self, client: httpx2.AsyncClient, address: str, seconds: float, name: str) -> None:
        self._client, self._address, self._seconds = client, address, seconds
        self._extensions = {"sni_hostname": name} if name else {}

    async def __call__(self, method: str, path: str, body: bytes = b"") -> tuple[httpx2.Response, bytes]:
        """The response and its body, of bounded size; raises ``Unreachable`` and ``ssl.SSLCertVerificationError``."""
        try:
            with anyio.fail_after(self._seconds + _LATE_S):
                made = self._client.build_request(method, path, content=body, extensions=self._extensions)
                response = await self._client.send(made, stream=True)
                return response, await _read_bounded(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise Unreachable(f"{self._address} does not answer in {self._seconds:.0f} s") from None
        except (httpx2.HTTPError, OSError) as e:
            raise _reason(e, self._address) from None


async def _read_bounded(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MAX_JOIN_BYTES:
            raise httpx2.HTTPError("the answer is too long")
    await response.aclose()
    return bytes(body)


def _reason(error: Exception, address: str) -> Exception:
    """What is below an error of the HTTP library: a verification that failed, a line that was cut, or nobody there."""
    chain, below = [error], error.__cause__ or error.__context__
    while isinstance(below, Exception):
        chain.append(below)
        below = below.__cause__ or below.__context__
    if failed := next((one for one in chain if isinstance(one, ssl.SSLCertVerificationError)), None):
        return failed
    if any(isinstance(one, _HUNG_UP) for one in chain):
        return _Cut(f"{address} hangs up; it may be busy: try again in a minute")
    known = next((one for one in reversed(chain) if isinstance(one, OSError) and one.strerror), error)
    words = getattr(known, "strerror", None) or str(known) or "it cannot be reached"
    return Unreachable(f"nobody admits Macs at {address}: {words.lower()}")


_HUNG_UP: Final = (
    *(ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, anyio.BrokenResourceError, anyio.EndOfStream),
    *(httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError),
)


def _date(response: httpx2.Response) -> float | None:
    try:
        return parsedate_to_datetime(response.headers.get("date", "")).timestamp()
    except (ValueError, TypeError):
        return None


def _address(peer: str) -> str:
    """``HOST`` or ``HOST:PORT``; raises ``InvalidOption``."""
    bare = peer.count(":") == 0 or peer.endswith("]")
    return format_address(*parse_address(f"{peer}:{DEFAULT_JOIN_PORT}" if bare else peer))
