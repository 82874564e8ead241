"""Join a cluster: find the coordinator of a token, verify it, and only then send it the secret.

The first call uses TLS without verification and asks for the authority's certificate, which is public. If it is not the
one that the token pins, nothing else is sent. The second call trusts that authority alone and checks the coordinator's
name. The key is created here, never leaves this Mac, and is kept until the answer arrives, so that a Mac that lost the
answer asks again with the same key.
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
from cluster.core.limits import DEFAULT_COORDINATOR_PORT
from cluster.core.text import format_address, parse_address
from cluster.discovery.coordinator_announcement import JOIN_SERVICE, look_for_coordinator
from cluster.joining.coordinator_search import search
from cluster.joining.join_messages import AUTHORITY, JOIN, JoinReply, JoinRequest, read_refusal, read_reply
from cluster.security.admission import clocks_in_words
from cluster.security.authority import PresentedAuthority, read_authority
from cluster.security.cluster_choice import remember_cluster, remember_coordinator
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request
from cluster.security.limits import (
    CLOCKS_DIFFER_S,
    DEFAULT_JOIN_PORT,
    JOIN_RETRY_S,
    JOIN_S,
    JOIN_SEARCH_S,
    JOIN_TRY_S,
    MAX_JOIN_BYTES,
)
from cluster.security.roles import Party, Role, name_of
from cluster.security.tokens import JoinToken

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JoinOrder:
    """How this Mac joins. An empty ``cluster`` keeps the cluster's own name; an empty ``peer`` searches for it.

    ``id`` (16 hex digits) is the id to be certified; ``clock`` is this Mac's.
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
    """The result: the party, the folder of its files, and by how many seconds this Mac's clock is ahead."""

    cluster: str
    party: Party
    address: str
    folder: Path
    clock_ahead_s: float

    @property
    def warning(self) -> str:
        """A warning about the clocks; empty if they agree well enough."""
        if abs(self.clock_ahead_s) <= CLOCKS_DIFFER_S:
            return ""
        return f"this Mac's clock is {clocks_in_words(self.clock_ahead_s)} the coordinator's; set the one that is wrong"


@dataclass(frozen=True, slots=True)
class Presented:
    """What an address presented before it was sent anything: its authority and its clock, unverified."""

    address: str
    authority: PresentedAuthority
    clock: float | None


async def join(order: JoinOrder) -> Joined:
    """Become a member. Raises ``MacpipeError``. Every step has a deadline."""
    presented = await _find_pinned(order)
    folder = ClusterFolder(order.home, order.cluster or presented.authority.cluster)
    if folder.exists and folder.authority.read_bytes() != presented.authority.certificate:
        raise InvalidOption(
            f"this Mac is in another cluster under the name {folder.cluster}; keep this one under another name with"
            f" --cluster NAME, or remove {folder.path}",
            field="cluster",
        )
    pending = order.home / "clusters" / ".joining" / f"{order.token.id}.pem"
    key, csr = _request(folder, pending)
    try:
        answer = await _request_admission(order, presented, csr)
    except TokenRefused:
        pending.unlink(missing_ok=True)  # no answer will come for this key
        raise
    now = order.clock()
    party = _install(order, folder, presented.authority, key, answer)
    pending.unlink(missing_ok=True)
    remember_cluster(order.home, folder.cluster)
    host, _ = parse_address(presented.address)
    remember_coordinator(order.home, folder.cluster, format_address(host, DEFAULT_COORDINATOR_PORT))
    return Joined(folder.cluster, party, presented.address, folder.path, now - answer.clock)


async def fetch_authority(address: str) -> Presented:
    """Return what ``address`` presents, unverified. Raises ``Unreachable``, ``ForeignAuthority``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The answer is public, and the caller compares it with the token's pin.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with _call(address, context, JOIN_TRY_S) as caller:
        response, body = await caller("GET", AUTHORITY)
    try:
        if response.status_code != httpx2.codes.OK:
            raise ValueError(f"its HTTP status is {response.status_code}")
        return Presented(address, read_authority(body), _date(response))
    except ValueError as e:
        raise ForeignAuthority(f"{address} is not a macpipe coordinator that admits Macs ({e})") from e


async def _find_pinned(order: JoinOrder) -> Presented:
    """Return the coordinator that issued the token, at the given address or found by a search."""

    async def look(address: str) -> Presented:
        presented = await fetch_authority(address)
        if presented.authority.fingerprint != order.token.fingerprint:
            raise ForeignAuthority(
                f"{address} is not the coordinator that issued this token: its cluster is"
                f" {presented.authority.cluster_id}, the token's {order.token.cluster_id}; no secret was sent"
            )
        return presented

    if order.peer:
        address = _address(order.peer)
        return await _retry_if_cut(lambda: look(address))
    async with look_for_coordinator(order.token.cluster_id, JOIN_SERVICE) as source:
        return await search(source, look, order.token.cluster_id, JOIN_SEARCH_S)


class _Cut(Unreachable):
    """The peer answered and closed the connection, as a full join port does."""


async def _retry_if_cut(call: Callable[[], Awaitable[T]]) -> T:
    """Return what ``call`` returns. Tries again for ``JOIN_SEARCH_S`` if the port is full or the connection was cut."""
    end = anyio.current_time() + JOIN_SEARCH_S
    while True:
        try:
            return await call()
        except (_Cut, Busy):
            if anyio.current_time() + JOIN_RETRY_S >= end:
                raise
        await anyio.sleep(JOIN_RETRY_S)


async def _request_admission(order: JoinOrder, presented: Presented, csr: bytes) -> JoinReply:
    """Post the request, again if the port is full or the connection was cut: the same key gets the same answer."""
    request = JoinRequest(
        token=order.token.id,
        secret=order.token.secret.hex(),
        csr=csr.decode(),
        id=order.id,
        name=order.name,
        clock=max(0.0, order.clock()),
    )
    return await _retry_if_cut(lambda: _post(order, presented, request))


async def _post(order: JoinOrder, presented: Presented, request: JoinRequest) -> JoinReply:
    context = ssl.create_default_context(cadata=presented.authority.certificate.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    name = name_of(Role.COORDINATOR, presented.authority.cluster_id)
    try:
        async with _call(presented.address, context, JOIN_S, name) as caller:
            response, body = await caller("POST", JOIN, request.model_dump_json().encode())
    except ssl.SSLCertVerificationError as e:
        raise _explain_verification_error(e, presented, order.clock()) from None
    if response.status_code != httpx2.codes.OK:
        raise read_refusal(body) or Unreachable(
            f"the coordinator at {presented.address} answers a request to join with HTTP status {response.status_code};"
            " see its log"
        )
    try:
        return read_reply(body)
    except ValueError as e:
        raise Unreachable(f"cannot read the answer of the coordinator at {presented.address}: {e}") from e


def _install(
    order: JoinOrder, folder: ClusterFolder, authority: PresentedAuthority, key: bytes, answer: JoinReply
) -> Party:
    """Write the certificate after checking that it is the one that was requested."""
    certificate = answer.certificate.encode()
    try:
        ring = Keyring.of(authority.certificate, certificate, key)
        if (ring.party.role, ring.party.cluster_id) != (order.token.role, authority.cluster_id):
            raise ValueError("it is for another role or cluster")
    except ValueError as e:
        raise ForeignAuthority(f"the coordinator's certificate for this Mac cannot be used: {e}") from e
    ring.check_clock(order.clock())
    folder.keep(ring.party.role, ring.party.name, key=key, certificate=certificate)
    folder.write(folder.authority, authority.certificate)  # last: with this file the Mac is in the cluster
    return ring.party


def _request(folder: ClusterFolder, pending: Path) -> tuple[bytes, bytes]:
    """Return a key and a request for it. Reuses the key of an earlier try with the same token, if there is one."""
    with suppress(OSError, ValueError):
        return make_request(pending.read_bytes())
    key, csr = make_request()
    folder.write(pending, key)
    return key, csr


def _explain_verification_error(error: ssl.SSLCertVerificationError, presented: Presented, now: float) -> MacpipeError:
    """Return the error for an invalid coordinator's certificate. A wrong clock may be the cause."""
    if error.verify_code not in _CLOCK_CODES:
        return ForeignAuthority(
            f"{presented.address} presents the right authority but is not its coordinator ({error.verify_message}); no"
            " secret was sent"
        )
    ahead = 0.0 if presented.clock is None else now - presented.clock
    if abs(ahead) > CLOCKS_DIFFER_S:
        return ClockWrong(
            f"this Mac's clock is {clocks_in_words(ahead)} the coordinator's, whose certificate is not valid at that"
            " time; set the clock and join again with the same token"
        )
    return ClockWrong(
        f"the coordinator's certificate is not valid now ({error.verify_message}); start `macpipe serve` there, which"
        " renews it, or set both clocks"
    )


_LATE_S: Final = 0.5
"""Extra time for the library's own timeouts, which close its socket; cancelling it in a handshake does not."""
_CLOCK_CODES: Final = frozenset({9, 10})
"""X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED."""


@asynccontextmanager
async def _call(address: str, context: ssl.SSLContext, seconds: float, name: str = "") -> AsyncIterator[_Caller]:
    """Yield a caller of ``address`` whose calls last at most ``seconds``. The certificate must be for ``name``."""
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
        """Return the response and its bounded body. Raises ``Unreachable``, ``ssl.SSLCertVerificationError``."""
        try:
            with anyio.fail_after(self._seconds + _LATE_S):
                request = self._client.build_request(method, path, content=body, extensions=self._extensions)
                response = await self._client.send(request, stream=True)
                return response, await _read_bounded(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise Unreachable(
                f"{self._address} did not answer within {self._seconds:.0f} s; check the address, and that both Macs"
                " are on one network"
            ) from None
        except (httpx2.HTTPError, OSError) as e:
            raise _find_cause(e, self._address) from None


async def _read_bounded(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MAX_JOIN_BYTES:
            raise httpx2.HTTPError("the answer is too long")
    await response.aclose()
    return bytes(body)


def _find_cause(error: Exception, address: str) -> Exception:
    """Return the cause of an error of the HTTP library: a failed verification, a cut connection, or no server."""
    chain = [error]
    below = error.__cause__ or error.__context__
    while isinstance(below, Exception):
        chain.append(below)
        below = below.__cause__ or below.__context__
    if failed := next((one for one in chain if isinstance(one, ssl.SSLCertVerificationError)), None):
        return failed
    if any(isinstance(one, _HUNG_UP) for one in chain):
        return _Cut(f"{address} closed the connection; it may be busy: try again in a minute")
    known = next((one for one in reversed(chain) if isinstance(one, OSError) and one.strerror), error)
    words = getattr(known, "strerror", None) or str(known) or "it cannot be reached"
    return Unreachable(f"no coordinator admits Macs at {address}: {words.lower()}")


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
