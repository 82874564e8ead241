"""The join port: TLS 1.3 with the coordinator's certificate, for strangers. Few at a time, and none for long.

uvicorn speaks the HTTP; how many connections there are, and how long they last, is decided here from the first packet
on, so that who opens many and says nothing costs the coordinator a few sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from cluster.core.errors import NoCluster, PortInUse
from cluster.core.text import format_address
from cluster.discovery.join_announcement import announce_join
from cluster.joining.join_service import JoinService
from cluster.security.admission import Admission
from cluster.security.bounds import JOIN_HANDSHAKE_S, JOIN_S, MAX_JOINS
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.quiet_h11 import QuietProtocol
from cluster.security.roles import Role

EVERYWHERE = "0.0.0.0"  # noqa: S104  # it is made for strangers; it is announced on no tunnel


@asynccontextmanager
async def admit_macs(folder: ClusterFolder, host: str, port: int) -> AsyncIterator[str]:
    """Admit Macs to the cluster of ``folder`` until the block is left; the address. Port 0 takes a free one.

    Raises ``PortInUse``, and ``NoCluster`` where this machine does not lead the cluster.
    """
    if folder.keyring(Role.COORDINATOR) is None:
        raise NoCluster(f"this Mac holds no coordinator's certificate of cluster {folder.cluster}")
    admission = Admission(folder)
    with _open_listener(host, port) as listener:
        at = listener.getsockname()[1]
        async with serve_join_port(JoinService(admission).application(), listener, folder.party(Role.COORDINATOR)):
            said = {"cluster": folder.cluster, "cluster_id": admission.authority.cluster_id}
            async with announce_join(**said, host=host, port=at):
                yield format_address(host, at)


@asynccontextmanager
async def serve_join_port(app: ASGIApp, listener: socket.socket, certificate: Path) -> AsyncIterator[None]:
    """Answer on ``listener`` with the key and certificate in the folder ``certificate`` until the block is left."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )
    config.load()
    door = _Door(config, Chain(certificate))
    server = await asyncio.get_running_loop().create_server(lambda: _Visit(door), sock=listener, backlog=MAX_JOINS)
    try:
        yield
    finally:
        server.close()
        door.close()


class Chain:
    """The TLS context of a folder's key and certificate, made anew when these were renewed."""

    def __init__(self, folder: Path) -> None:
        self._certificate, self._key = folder / "certificate.pem", folder / "key.pem"
        self._stamp: tuple[Stamp, ...] = ()
        self.context()

    def context(self) -> ssl.SSLContext:
        with contextlib.suppress(OSError, ssl.SSLError):  # between the two writes of a renewal the old one serves
            stamp = file_version(self._certificate), file_version(self._key)
            if stamp != self._stamp:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.load_cert_chain(self._certificate, self._key)
                self._context, self._stamp = context, stamp
        return self._context


class _Door:
    """Who is inside."""

    def __init__(self, config: uvicorn.Config, chain: Chain) -> None:
        self.config, self.chain, self.state = config, chain, ServerState()
        self.visits: set[_Visit] = set()

    def close(self) -> None:
        """Cut off everybody, also who is being answered: it asks again elsewhere."""
        for visit in tuple(self.visits):
            visit.end()
        for task in tuple(self.state.tasks):
            task.cancel()


class _Visit(asyncio.Protocol):
    """One connection: handed to TLS and uvicorn as soon as it is made, and cut off when its time is over."""

    def __init__(self, door: _Door) -> None:
        self._door = door
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if len(self._door.visits) >= MAX_JOINS:
            transport.abort()
            return
        transport.pause_reading()
        self._door.visits.add(self)
        self._over = self._loop.call_later(JOIN_S, self.end)
        self._shake = self._loop.create_task(self._begin())

    def end(self) -> None:
        """Cut the connection."""
        self._transport.abort()

    def leave(self) -> None:
        """The connection is closed."""
        self._door.visits.discard(self)
        self._over.cancel()

    async def _begin(self) -> None:
        """Shake hands; from then on everything is uvicorn's."""
        http = _Http(self)
        try:
            secure = await self._loop.start_tls(
                self._transport,
                http,
                self._door.chain.context(),
                server_side=True,
                ssl_handshake_timeout=JOIN_HANDSHAKE_S,
            )
        except (OSError, asyncio.CancelledError):  # no TLS, or gone: nobody to tell
            self.end()
            self.leave()
            return
        assert secure is not None
        http.connection_made(secure)

    @property
    def config(self) -> uvicorn.Config:
        return self._door.config

    @property
    def state(self) -> ServerState:
        return self._door.state


class _Http(QuietProtocol):
    """uvicorn's own, which may be sent data before it learns that the handshake is done."""

    def __init__(self, visit: _Visit) -> None:
        super().__init__(visit.config, visit.state, {})
        self._visit = visit
        self._early: list[bytes] | None = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        early, self._early = self._early, None
        for data in early or ():
            super().data_received(data)

    def data_received(self, data: bytes) -> None:
        if self._early is None:
            super().data_received(data)
        else:
            self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._visit.leave()
        if self._early is None:
            super().connection_lost(exc)


@contextlib.contextmanager
def _open_listener(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except OSError as e:
            raise PortInUse(
                f"cannot admit Macs on {format_address(host, port)}: {(e.strerror or str(e)).lower()}; choose another"
                " port with --join-port PORT, or 0 for a free one"
            ) from e
        listener.setblocking(False)
        yield listener
    finally:
        listener.close()
