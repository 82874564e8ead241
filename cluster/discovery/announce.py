"""Announce a server over Zeroconf and withdraw it. Nothing in an announcement is secret, or proves anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Final

from zeroconf import Error
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from cluster.discovery import txt_record as txt
from cluster.discovery.interfaces import Reach, interfaces, reach
from cluster.discovery.multicast import FOLLOW_S, alongside, close_multicast, follow_interfaces, open_multicast

log = logging.getLogger(__name__)

ANNOUNCE_S: Final = 5.0
"""Probing for the name takes 0.7 s. A network that refuses packets must not delay a worker's start for longer."""
TTL_S: Final = 120
"""A worker that left without a goodbye is forgotten after this. The DNS default of 75 minutes suits printers."""


@contextlib.asynccontextmanager
async def announce(*, id: str, name: str, version: str, cluster: str, host: str, port: int) -> AsyncIterator[None]:  # noqa: A002
    """Announce the worker whose control port listens on ``host`` and ``port``. It takes about a second to be visible.

    The end of the block sends a goodbye. A loopback host is announced on loopback alone, a wildcard on every other
    interface, an address on its own interface. Without multicast this logs a warning and announces nothing. Raises
    InvalidOption for fields that cannot be announced (see ``txt.Announcement``).
    """
    fields = txt.Announcement(id=id, name=name, version=version, cluster=cluster)
    async with publish(lambda here: _info(fields, here, port), host, "this worker"):
        yield


@contextlib.asynccontextmanager
async def publish(info: Callable[[Reach], AsyncServiceInfo], host: str, what: str) -> AsyncIterator[None]:
    """Announce the service ``what`` on ``host`` while the block runs. ``info`` builds its DNS records."""
    here = await _reach(host)
    if not here.senders:
        log.warning("announcement: skipped, no interface has this address address=%s service=%s", host, what)
    zeroconf = open_multicast(here.senders, f"announce {what}") if here.senders else None
    if zeroconf is None:
        yield
        return
    try:
        async with alongside(_keep_up(zeroconf, info, host, what)):
            yield
    finally:
        await close_multicast(zeroconf)


async def _reach(host: str) -> Reach:
    return reach(await _ip(host), interfaces())


async def _ip(host: str) -> str:
    """Return ``host`` if it is an IP address, else the address it resolves to; loopback if it does not resolve."""
    with contextlib.suppress(ValueError):
        return str(ip_address(host))
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(ANNOUNCE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return str(found[0][4][0])
    log.warning("announcement: on loopback only, since the host does not resolve host=%s", host)
    return "127.0.0.1"


def _info(fields: txt.Announcement, here: Reach, port: int) -> AsyncServiceInfo:
    label = txt.instance(fields)
    return AsyncServiceInfo(
        txt.SERVICE,
        f"{label}.{txt.SERVICE}",
        port=port,
        properties=dict(txt.write(fields)),
        server=f"{label}.local.",
        parsed_addresses=list(here.addresses),
        host_ttl=TTL_S,
        other_ttl=TTL_S,
    )


async def _register(zeroconf: AsyncZeroconf, info: AsyncServiceInfo, what: str) -> None:
    """Register the service. Zeroconf numbers a taken instance name; readers take the name from the TXT record."""
    try:
        async with asyncio.timeout(ANNOUNCE_S):
            await zeroconf.async_register_service(info, allow_name_change=True)
    except (OSError, Error, TimeoutError) as error:
        why = str(error) or type(error).__name__
        log.warning("announcement: cannot register service reason=%s service=%s", why, what)


async def _keep_up(zeroconf: AsyncZeroconf, make: Callable[[Reach], AsyncServiceInfo], host: str, what: str) -> None:
    """Announce, and update the addresses when the machine's interfaces change."""
    here = await _reach(host)
    info = make(here)
    await _register(zeroconf, info, what)
    while True:
        await asyncio.sleep(FOLLOW_S)
        now = await _reach(host)
        if now != here and now.senders:
            here = now
            await follow_interfaces(zeroconf, here.senders)
            fresh = make(here)
            fresh.name = info.name
            with contextlib.suppress(OSError, Error):
                await zeroconf.async_update_service(fresh)
