"""The HTTP port, served by uvicorn inside the coordinator's own event loop: plain on loopback alone, else over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

import anyio
import uvicorn
from starlette.types import ASGIApp

from cluster.address import format_address, is_loopback
from cluster.api.http.connection import Connection
from cluster.errors import InvalidOption, PortInUse
from cluster.limits import CLOSE_S, HEADER_TIMEOUT_S, IDLE_CONNECTION_S, LAST_WORDS_S, MAX_CONNECTIONS
from cluster.security.https import HttpCertificate

SWEEP_S: Final = 1.0
_TICKS: Final = round(SWEEP_S / 0.1)
"""Uvicorn ticks ten times a second."""


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: the daemon has one place that ends it.

    It sweeps its connections, and takes hands that are not shaken back in time.
    """

    def __init__(self, config: uvicorn.Config, certificate: HttpCertificate | None) -> None:
        super().__init__(config)
        self._certificate = certificate

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as uvicorn does, but with our bounds on TLS, and our connections."""
        own, backlog = self._certificate, self.config.backlog
        listening = functools.partial(asyncio.get_running_loop().create_server, self._connection, backlog=backlog)
        if own:
            bounds = {"ssl_handshake_timeout": HEADER_TIMEOUT_S, "ssl_shutdown_timeout": CLOSE_S}
            listening = functools.partial(listening, ssl=own.context, **bounds)
        self.servers = [await listening(sock=one) for one in sockets or ()]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Once a second, beside what uvicorn does."""
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                connection.sweep(now)  # type: ignore[union-attr]  # all are of our own kind
            if self._certificate:
                self._certificate.refresh()
        return await super().on_tick(counter)

    def _connection(self) -> Connection:
        self._make_room()
        return Connection(config=self.config, server_state=self.server_state, app_state={})

    def _make_room(self) -> None:
        """Where all connections are taken, the one goes that has kept us waiting longest for a request."""
        if len(self.server_state.connections) < MAX_CONNECTIONS - 1:
            return
        waiting = [(since, c) for c in self.server_state.connections if (since := c.waits()) is not None]  # type: ignore[union-attr]
        if waiting:
            min(waiting, key=lambda pair: pair[0])[1].transport.abort()


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
async def serving(
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
        limit_concurrency=MAX_CONNECTIONS,
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
