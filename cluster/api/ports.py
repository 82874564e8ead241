"""The ports of a coordinator: on which hosts it listens, and its HTTP port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import anyio
import anyio.to_thread
from grpc import aio
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api.http.port_settings import HttpPort, http_port
from cluster.api.http.server import listen, serve
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import ServeSettings
from cluster.core.errors import PortInUse
from cluster.core.text import format_address, is_loopback, parse_address
from cluster.discovery.interfaces import LOOPBACK, Interface, best_address, host_for_others, interfaces
from cluster.security.trust import Trust
from cluster.transport.grpc_setup import bind

HTTP_RETRY_S: Final = 1.0
"""How often a port without a certificate looks for one."""
__all__ = ["HttpFront", "addresses_for_others", "bind_public", "serve_http", "url_for_others"]


class HttpFront:
    """The application of a process's HTTP port, which outlives its roles.

    A standby that is elected goes on with the streams that it passes on: from then on, it passes them to itself.
    """

    def __init__(self) -> None:
        self.url = ""
        """Where it answers; "" while HTTP is off."""
        self._app: ASGIApp | None = None
        self._ready = asyncio.Event()

    def answer_by(self, app: ASGIApp) -> None:
        """Have this application answer new requests from now on."""
        self._app = app
        self._ready.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. The first ones wait for the first application."""
        await self._ready.wait()
        assert self._app
        await self._app(scope, receive, send)


def bind_public(server: aio.Server, settings: ServeSettings, trust: Trust) -> tuple[str, ...]:
    """Make the server listen on the public port. Return its addresses; the first is the one shown to users.

    Raises as ``bind`` does.
    """
    hosts, port = _listening_hosts(settings, trust), settings.port
    for host in hosts:
        port = bind(server, trust, host, port)
    return tuple(format_address(host, port) for host in hosts)


def addresses_for_others(addresses: Sequence[str], local: Sequence[Interface]) -> tuple[str, ...]:
    """Return where other Macs reach a port that listens at ``addresses``, the last of which is the best.

    Loopback, which leads other Macs to themselves, is left out unless nothing else is there.
    """
    parsed = [parse_address(address) for address in reversed(addresses)]
    found = [(host_for_others(host, local), port) for host, port in parsed]
    outer = [one for one in found if not is_loopback(one[0])]
    return tuple(dict.fromkeys(format_address(*one) for one in outer or found))


def url_for_others(url: str, local: Sequence[Interface]) -> str:
    """Return the URL, ``http://HOST:PORT``, with a host at which other Macs reach it if it has a wildcard."""
    scheme, _, address = url.partition("://")
    host, port = parse_address(address)
    return f"{scheme}://{format_address(host_for_others(host, local), port)}"


def _listening_hosts(settings: ServeSettings, trust: Trust) -> tuple[str, ...]:
    if settings.host or not trust.me:
        return (settings.host or LOOPBACK,)
    return tuple(dict.fromkeys((LOOPBACK, best_address(interfaces()))))


@asynccontextmanager
async def serve_http(
    settings: ServeSettings, port: HttpPort, front: HttpFront, report: Reporter
) -> AsyncIterator[None]:
    """Serve HTTP, unless it is off or its default port is in use; once it has its certificate, if it lacks one.

    Raises ``PortInUse`` if the user asked for this port.
    """
    if settings.http.address is None:
        yield
        return
    if port.problem:
        report.problem(port.problem)
        async with _serve_later(settings, front, report):
            yield
        return
    try:
        listener = _listen(settings, port)
    except PortInUse as e:
        if settings.http.wanted:
            raise
        report.problem(f"HTTP is off: {e.sentence}")
        yield
        return
    async with _serve(listener, port, front):
        yield


def _listen(settings: ServeSettings, port: HttpPort) -> socket.socket:
    assert settings.http.address
    return listen(*settings.http.address, encrypted=port.certificate is not None)


@asynccontextmanager
async def _serve(listener: socket.socket, port: HttpPort, front: HttpFront) -> AsyncIterator[None]:
    async with serve(front, listener, port.certificate) as address:
        front.url = f"{'https' if port.certificate else 'http'}://{address}"
        yield


@asynccontextmanager
async def _serve_later(settings: ServeSettings, front: HttpFront, report: Reporter) -> AsyncIterator[None]:
    """Serve HTTP as soon as there is a certificate, which another task asks for. On exit, streams may end first."""
    ended = anyio.Event()

    async def serve_then() -> None:
        with anyio.CancelScope(shield=True):
            while (port := await anyio.to_thread.run_sync(http_port, settings)).problem:
                with anyio.move_on_after(HTTP_RETRY_S):
                    await ended.wait()
                if ended.is_set():
                    return
            try:
                listener = _listen(settings, port)
            except PortInUse as e:
                report.problem(f"HTTP stays off: {e.sentence}")
                return
            async with _serve(listener, port, front):
                report.problem(f"HTTP has its certificate now, and answers at {front.url}")
                await ended.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_then)
        try:
            yield
        finally:
            ended.set()
