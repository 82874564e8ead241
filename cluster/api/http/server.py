"""The HTTP port, served by uvicorn in the coordinator's event loop. Plain HTTP on loopback only, else TLS."""

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
from cluster.core.limits import CLOSE_S, HEADER_TIMEOUT_S, IDLE_CONNECTION_S, MAX_CONNECTIONS, SHUTDOWN_GRACE_S
from cluster.core.text import format_address, is_loopback
from cluster.security.https import HttpCertificate

log = logging.getLogger(__name__)

SWEEP_S: Final = 1.0
ACCEPTS_AT_ONCE: Final = 64
"""Connections accepted before other tasks run."""
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of accept() that mean exhausted resources; any other error concerns a single client."""
ACCEPT_PAUSE_S: Final = 0.1
REPORT_S: Final = 60.0
"""Minimum interval between log lines about closed connections."""
_TICKS: Final = round(SWEEP_S / 0.1)
"""Uvicorn ticks per sweep; uvicorn ticks ten times a second."""


class _Server(uvicorn.Server):
    """Uvicorn without signal handlers, since the daemon handles signals in one place.

    It accepts connections itself, so that a connection needs a slot from the start, before its TLS handshake.
    """

    def __init__(self, config: uvicorn.Config, certificate: HttpCertificate | None) -> None:
        super().__init__(config)
        self._certificate = certificate
        self._limit = ConnectionLimit(MAX_CONNECTIONS)
        self._opening: set[asyncio.Task[None]] = set()
        self._reported = -REPORT_S

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept. Uvicorn's version accepts without limit and counts a connection after its handshake."""
        self.servers = []
        for listener in sockets or ():
            self._watch(listener)
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            asyncio.get_running_loop().remove_reader(listener)
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Once a second: sweep connections, refresh the certificate, and log closed connections."""
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                connection.sweep(now)  # type: ignore[union-attr]  # all are instances of Connection
            if self._certificate:
                self._certificate.refresh()
            if now - self._reported >= REPORT_S and (counts := self._limit.take_counts()):
                self._reported = now
                log.warning("http connections closed: %s", " ".join(f"{name}={n}" for name, n in counts.items()))
        return await super().on_tick(counter)

    def _watch(self, listener: socket.socket) -> None:
        """Accept whenever a connection waits, until shutdown.

        loop.sock_accept would lose a connection that comes in the turn in which it is cancelled.
        """
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept a batch. Until the next one, what earlier connections have sent is read."""
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                accepted, address = listener.accept()
            except OSError as e:
                if e.errno in EXHAUSTED:
                    self._limit.make_room()
                    loop = asyncio.get_running_loop()
                    loop.remove_reader(listener)
                    loop.call_later(ACCEPT_PAUSE_S, self._watch, listener)
                return
            accepted.setblocking(False)
            self._open(accepted, address[0])

    def _open(self, accepted: socket.socket, address: str) -> None:
        """Serve a new connection, or close it if there is no free slot."""
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
    """Return a listening socket. Raises ``PortInUse``, and ``InvalidOption`` for plain HTTP off loopback."""
    if not (encrypted or is_loopback(host)):
        raise unprotected_port_error(host)
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
            "another address with --http HOST:PORT, or turn HTTP off with --http off"
        ) from e
    listener.setblocking(False)
    return listener


def unprotected_port_error(host: str) -> InvalidOption:
    """Return the error for an HTTP port that would be open to everybody."""
    return InvalidOption(
        f"HTTP on {host} would be open to everybody on the network: without a cluster there are no keys and no "
        "certificate. Create a cluster with `macpipe init`; or give --http a loopback address, such as "
        "127.0.0.1:8080, and forward the port with ssh -L if needed",
        field="http",
    )


@asynccontextmanager
async def serve(
    app: ASGIApp, listener: socket.socket, certificate: HttpCertificate | None = None
) -> AsyncIterator[str]:
    """Serve on ``listener`` and yield its address. On exit, live requests have ``SHUTDOWN_GRACE_S`` seconds to end."""
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
        timeout_graceful_shutdown=max(1, round(SHUTDOWN_GRACE_S)),
        backlog=MAX_CONNECTIONS,
        limit_concurrency=2 * MAX_CONNECTIONS,
    )
    server = _Server(config, certificate)
    host, port = listener.getsockname()[:2]

    async def run() -> None:
        with anyio.CancelScope(shield=True):  # should_exit ends it, so that streams can send their last event
            await server.serve([listener])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield format_address(host, port)
        finally:
            server.should_exit = True
