"""The ports of a coordinator: on which hosts it listens, and its HTTP port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp

from cluster.api.http.port_settings import HttpPort
from cluster.api.http.server import listen, serve
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import ServeSettings
from cluster.core.errors import PortInUse
from cluster.discovery.interfaces import LOOPBACK, best_address, interfaces
from cluster.security.trust import Trust

__all__ = ["listening_hosts", "serve_http"]


def listening_hosts(settings: ServeSettings, trust: Trust) -> tuple[str, ...]:
    """Return the hosts on which the public port listens; the first is the one shown to users."""
    if settings.host or not trust.me:
        return (settings.host or LOOPBACK,)
    return tuple(dict.fromkeys((LOOPBACK, best_address(interfaces()))))


@asynccontextmanager
async def serve_http(settings: ServeSettings, port: HttpPort, app: ASGIApp, report: Reporter) -> AsyncIterator[str]:
    """Serve HTTP and yield its URL; an empty URL if HTTP is off, or its default port is in use.

    Raises ``PortInUse`` if the user asked for this port.
    """
    if settings.http.address is None:
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
