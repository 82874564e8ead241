"""The ports of a coordinator: on which hosts it listens, and its HTTP port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from grpc import aio
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api.http.port_settings import HttpPort, http_port
from cluster.api.http.server import listen, serve
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import ServeSettings
from cluster.core.errors import AuthorityElsewhere, PortInUse
from cluster.core.text import format_address
from cluster.discovery.interfaces import LOOPBACK, best_address, interfaces
from cluster.security.trust import Trust
from cluster.transport.grpc_setup import bind

__all__ = ["HttpFront", "bind_public", "http_port_or_off", "serve_http"]


class HttpFront:
    """The application of a process's HTTP port, which outlives its roles.

    A standby that is elected goes on with the streams that it passes on: from then on, it passes them to itself.
    """

    def __init__(self) -> None:
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


def _listening_hosts(settings: ServeSettings, trust: Trust) -> tuple[str, ...]:
    if settings.host or not trust.me:
        return (settings.host or LOOPBACK,)
    return tuple(dict.fromkeys((LOOPBACK, best_address(interfaces()))))


def http_port_or_off(settings: ServeSettings, report: Reporter) -> HttpPort:
    """Return the HTTP port of ``settings``; one that is off if its certificate must come from another Mac, and has not.

    Raises as ``http_port`` does.
    """
    try:
        return http_port(settings)
    except AuthorityElsewhere as e:
        report.problem(f"HTTP is off: {e.sentence}")
        return replace(http_port(replace(settings, http=replace(settings.http, address=None))), off=True)


@asynccontextmanager
async def serve_http(settings: ServeSettings, port: HttpPort, app: ASGIApp, report: Reporter) -> AsyncIterator[str]:
    """Serve HTTP and yield its URL; an empty URL if HTTP is off, or its default port is in use.

    Raises ``PortInUse`` if the user asked for this port.
    """
    if settings.http.address is None or port.off:
        yield ""
        return
    try:
        listener = listen(*settings.http.address, encrypted=port.certificate is not None)
    except PortInUse as e:
        if settings.http.wanted:
            raise
        report.problem(f"HTTP is off: {e.sentence}")
        yield ""
        return
    async with serve(app, listener, port.certificate) as address:
        yield f"{'https' if port.certificate else 'http'}://{address}"
