"""The HTTP port, served by uvicorn inside the coordinator's own event loop: plain on loopback alone, else over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import uvicorn
from starlette.types import ASGIApp

from cluster.api.http.connection import Connection
from cluster.api.http.connection_limit import ConnectionLimit
from cluster.core.errors import InvalidOption, PortInUse
from cluster.core.limits import CLOSE_S, HEADER_TIMEOUT_S, IDLE_CONNECTION_S, LAST_WORDS_S, MAX_CONNECTIONS
from cluster.core.text import format_address, is_loopback
from cluster.security.https import HttpCertificate

log = logging.getLogger(__name__)

SWEEP_S: Final = 1.0
ACCEPTS_AT_ONCE: Final = 64
"""Connections accepted before others get their turn of the event loop."""
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Why no connection can be accepted for now; any other error is that one client's."""
ACCEPT_PAUSE_S: Final = 0.1
REPORT_S: Final = 60.0
"""How often at most the log tells of connections that were closed on clients."""
_TICKS: Final = round(SWEEP_S / 0.1)
"""Uvicorn ticks ten times a second."""


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: the daemon has one place that ends it.

    It accepts connections itself, since each needs a slot from its first packet, handshakes included.
    """

    def __init__(self, config: uvicorn.Config, certificate: HttpCertificate | None) -> None:
        super().__init__(config)
        self._certificate = certificate
        self._limit = ConnectionLimit(MAX_CONNECTIONS)
        self._accepting: list[asyncio.Task[None]] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._reported = -REPORT_S

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. uvicorn's own way would accept whatever comes, and count a connection once its handshake is done."""
        self.servers = []
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in sockets or ()]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in (*self._accepting, *self._opening):
            task.cancel()
        await asyncio.gather(*self._accepting, *self._opening, return_exceptions=True)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Once a second, beside what uvicorn does."""
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                connection.sweep(now)  # type: ignore[union-attr]  # all are of our own kind
            if self._certificate:
                self._certificate.refresh()
            for task in self._accepting:
                if task.done():
                    task.result()  # raises: a port that accepts no more must not go unnoticed
            if now - self._reported >= REPORT_S and (counts := self._limit.take_counts()):
                self._reported = now
                log.warning("http connections closed: %s", " ".join(f"{name}={n}" for name, n in counts.items()))
        return await super().on_tick(counter)

    async def _accept(self, listener: socket.socket) -> None:
        """Accept for ever. A pause between batches lets requests of those who came first be read before more come."""
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(ACCEPTS_AT_ONCE):
                try:
                    accepted, address = await loop.sock_accept(listener)
                except OSError as e:
                    if e.errno in EXHAUSTED:
                        self._limit.make_room()
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                    break
                self._open(accepted, address[0])
            await asyncio.sleep(0)

    def _open(self, accepted: socket.socket, address: str) -> None:
        """Give a new connection a slot, and begin to serve it; close it where there is none."""
        slot = self._limit.take(address)
        if slot is None:
            accepted.close()
            return
        connection = Connection(self._limit, slot, config=self.config, server_state=self.server_state, app_state={})
        task = asyncio.create_task(self._connect(accepted, connection))
        slot.close = task.cancel
        self._opening.add(task)

        def finish(task: asyncio.Task[None]) -> None:
            self._opening.discard(task)
            if task.cancelled() or task.exception() or connection.transport is None:
                self._limit.leave(slot)
                accepted.close()

        task.add_done_callback(finish)

    async def _connect(self, accepted: socket.socket, connection: Connection) -> None:
        tls: dict[str, Any] = {}
        if self._certificate:
            bounds = {"ssl_handshake_timeout": HEADER_TIMEOUT_S, "ssl_shutdown_timeout": CLOSE_S}
            tls = {"ssl": self._certificate.context, **bounds}
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, accepted, **tls)


def listen(host: str, port: int, *, encrypted: bool = False) -> socket.socket:
    """A listening socket. Raises ``InvalidOption`` off loopback unless it is for TLS, and ``PortInUse``."""
    if not (encrypted or is_loopback(host)):
        raise open_to_everybody(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as e:
        listener.close()
        raise PortInUse(
            f"cannot listen on {format_address(host, port)} for HTTP: {(e.strerror or str(e)).lower()}; choose "
            "another with --http HOST:PORT, or none with --http off"
        ) from e
    listener.setblocking(False)
    return listener


def open_to_everybody(host: str) -> InvalidOption:
    """Why HTTP is not opened there."""
    return InvalidOption(
        f"HTTP on {host} would be open to everybody on the network: there is no cluster, and so there are no keys and "
        "no certificate. Make one with `macpipe init`; or give --http an address of this machine alone, such as "
        "127.0.0.1:8080, and forward the port with ssh -L where needed",
        field="http",
    )


@asynccontextmanager
async def serve(
    app: ASGIApp, listener: socket.socket, certificate: HttpCertificate | None = None
) -> AsyncIterator[str]:
    """Answer on ``listener`` until the block is left; its address. Requests under way get a moment to end."""
    config = uvicorn.Config(
        app,
        http="h11",
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(IDLE_CONNECTION_S),
        timeout_graceful_shutdown=max(1, round(LAST_WORDS_S)),
        backlog=MAX_CONNECTIONS,
        limit_concurrency=2 * MAX_CONNECTIONS,
    )
    server = _Server(config, certificate)
    host, port = listener.getsockname()[:2]

    async def run() -> None:
        with anyio.CancelScope(shield=True):  # it ends when told to, so that streams get their last words
            await server.serve([listener])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield format_address(host, port)
        finally:
            server.should_exit = True
