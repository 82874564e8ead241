"""The HTTP port: opened on loopback alone, served by uvicorn inside the coordinator's own event loop."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from starlette.types import ASGIApp

from cluster.address import format_address
from cluster.errors import InvalidOption, PortInUse
from cluster.limits import IDLE_CONNECTION_S, LAST_WORDS_S, MAX_CONNECTIONS
from cluster.security.credentials import is_loopback


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: the daemon has one place that ends it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``InvalidOption`` off loopback, and ``PortInUse``."""
    if not is_loopback(host):
        raise InvalidOption(
            f"HTTP on {host} would be open to everybody on the network, since it has no keys yet; give --http an "
            "address of this machine alone, such as 127.0.0.1:8080, and forward the port with ssh -L where needed",
            field="http",
        )
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


@asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator[str]:
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
    server = _Server(config)
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
