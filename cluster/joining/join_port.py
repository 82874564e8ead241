"""The join port: TLS 1.3 with the coordinator's certificate, for strangers. Connections are few and short.

uvicorn speaks HTTP. This module bounds the number of connections and their duration from the first packet on, so that
a stranger who opens many connections and sends nothing costs the coordinator a few sockets.
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
from cluster.discovery.coordinator_announcement import announce_join
from cluster.joining.join_service import JoinService
from cluster.security.admission import Admission
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.h11_protocol import QuietProtocol
from cluster.security.limits import JOIN_HANDSHAKE_S, JOIN_S, MAX_JOINS
from cluster.security.roles import Role

EVERYWHERE = "0.0.0.0"  # noqa: S104  # strangers must reach it; it is not announced on tunnels


@asynccontextmanager
async def admit_macs(folder: ClusterFolder, host: str, port: int) -> AsyncIterator[str]:
    """Admit Macs to the cluster of ``folder`` for the duration of the block, and yield the port's address.

    Port 0 takes a free port. Raises ``PortInUse``, and ``NoCluster`` if this machine does not lead the cluster.
    """
    if folder.keyring(Role.COORDINATOR) is None:
        raise NoCluster(f"this Mac has no coordinator's certificate for the cluster {folder.cluster}")
    admission = Admission(folder)
    with _open_listener(host, port) as listener:
        bound_port = listener.getsockname()[1]
        async with (
            serve_join_port(JoinService(admission).application(), listener, folder.party(Role.COORDINATOR)),
            announce_join(
                cluster=folder.cluster, cluster_id=admission.authority.cluster_id, host=host, port=bound_port
            ),
        ):
            yield format_address(host, bound_port)


@asynccontextmanager
async def serve_join_port(app: ASGIApp, listener: socket.socket, certificate: Path) -> AsyncIterator[None]:
    """Serve ``app`` on ``listener`` during the block, with the key and certificate in the folder ``certificate``."""
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
    port = _Port(config, ReloadingChain(certificate))
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(port), sock=listener, backlog=MAX_JOINS)
    try:
        yield
    finally:
        server.close()
        port.close()


class ReloadingChain:
    """The TLS context of a folder's key and certificate, loaded again after a renewal."""

    def __init__(self, folder: Path) -> None:
        self._certificate, self._key = folder / "certificate.pem", folder / "key.pem"
        self._stamp: tuple[Stamp, ...] = ()
        self.context()

    def context(self) -> ssl.SSLContext:
        with contextlib.suppress(OSError, ssl.SSLError):  # between the two writes of a renewal the old one stays
            stamp = file_version(self._certificate), file_version(self._key)
            if stamp != self._stamp:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.load_cert_chain(self._certificate, self._key)
                self._context, self._stamp = context, stamp
        return self._context


class _Port:
    """The open connections."""

    def __init__(self, config: uvicorn.Config, chain: ReloadingChain) -> None:
        self.config, self.chain, self.state = config, chain, ServerState()
        self.connections: set[_Connection] = set()

    def close(self) -> None:
        """Cut every connection, even one with an answer under way: its Mac asks again."""
        for connection in tuple(self.connections):
            connection.abort()
        for task in tuple(self.state.tasks):
            task.cancel()


class _Connection(asyncio.Protocol):
    """One connection: handed to TLS and uvicorn as soon as it is made, and cut when its time is over."""

    def __init__(self, port: _Port) -> None:
        self._port = port
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if len(self._port.connections) >= MAX_JOINS:
            transport.abort()
            return
        transport.pause_reading()
        self._port.connections.add(self)
        self._timeout = self._loop.call_later(JOIN_S, self.abort)
        self._handshake = self._loop.create_task(self._start_tls())

    def abort(self) -> None:
        """Cut the connection."""
        self._transport.abort()

    def release(self) -> None:
        """Forget the connection, which is closed."""
        self._port.connections.discard(self)
        self._timeout.cancel()

    async def _start_tls(self) -> None:
        """Complete the TLS handshake and hand the connection to uvicorn."""
        http = _Http(self)
        try:
            secure = await self._loop.start_tls(
                self._transport,
                http,
                self._port.chain.context(),
                server_side=True,
                ssl_handshake_timeout=JOIN_HANDSHAKE_S,
            )
        except (OSError, asyncio.CancelledError):  # not TLS, or closed: there is nobody to answer
            self.abort()
            self.release()
            return
        assert secure is not None
        http.connection_made(secure)

    @property
    def config(self) -> uvicorn.Config:
        return self._port.config

    @property
    def state(self) -> ServerState:
        return self._port.state


class _Http(QuietProtocol):
    """uvicorn's protocol, buffering data that arrives before it learns that the handshake is done."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__(connection.config, connection.state, {})
        self._connection = connection
        self._early: list[bytes] | None = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
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
        self._connection.release()
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
