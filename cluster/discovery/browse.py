"""Listens for announcements over Zeroconf and keeps a roster of those that belong to one cluster.

It believes nothing that it hears: malformed announcements are passed over, and everything that grows has a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from zeroconf import Error, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from cluster.core.limits import MAX_ROSTER
from cluster.core.text import format_address
from cluster.discovery import txt_record as txt
from cluster.discovery.interfaces import Interface, interfaces, preferred_address
from cluster.discovery.multicast import FOLLOW_S, alongside, close_multicast, follow_interfaces, open_multicast
from cluster.discovery.sighting import Sighting, Source
from cluster.discovery.sighting_table import SightingTable

log = logging.getLogger(__name__)

MAX_TXT_BYTES: Final = 2048
"""Four of our fields need 600; longer records are not ours."""
QUESTION_S: Final = 3.0
"""How long to wait for the rest of an announcement that came in pieces."""
ASKERS: Final = 8
Reader = Callable[[AsyncServiceInfo, tuple[Interface, ...]], Sighting | None]
"""What a complete announcement says, or None where it is malformed or names no address that we could try."""


@contextlib.asynccontextmanager
async def browse(cluster: str) -> AsyncIterator[Source]:
    """What is announced for ``cluster`` on any interface, loopback included, for as long as the block lasts.

    Where multicast does not work this logs a warning and finds nothing.
    """
    async with listen(cluster, txt.SERVICE, read_sighting, "look for workers") as source:
        yield source


@contextlib.asynccontextmanager
async def listen(cluster: str, service: str, read: Reader, purpose: str) -> AsyncIterator[Source]:
    """As ``browse``, for announcements of ``service``, which ``read`` turns into sightings."""
    roster = SightingTable()
    zeroconf = open_multicast(None, purpose)
    if zeroconf is None:
        yield roster
        return
    try:
        listener = _Listener(zeroconf, cluster, roster, service, read)
        async with alongside(listener.run()):
            yield roster
    finally:
        await close_multicast(zeroconf)


def read_sighting(info: AsyncServiceInfo, local: tuple[Interface, ...]) -> Sighting | None:
    """What a complete announcement says, or nothing when it is malformed or names no address that we could try."""
    if not info.port or len(info.text or b"") > MAX_TXT_BYTES:
        return None
    said = txt.read(info.properties)
    host = preferred_address(info.parsed_scoped_addresses(), local)
    if said is None or not host:
        return None
    return Sighting(format_address(host, info.port), said.id, said.name, said.version, said.cluster)


class _Listener:
    """Turns what the browser hears into entries of a roster."""

    def __init__(
        self,
        zeroconf: AsyncZeroconf,
        cluster: str,
        roster: SightingTable,
        service: str = txt.SERVICE,
        read: Reader = read_sighting,
    ) -> None:
        self._zeroconf = zeroconf
        self._service, self._read = service, read
        self._cluster = cluster
        self._roster = roster
        self._local = interfaces()
        # Names to ask about. When it is full, further ones wait until they are announced again.
        self._questions: asyncio.Queue[str] = asyncio.Queue(MAX_ROSTER)

    async def run(self) -> None:
        with contextlib.suppress(Error):
            await self._zeroconf.zeroconf.async_wait_for_start()
        browser = AsyncServiceBrowser(self._zeroconf.zeroconf, self._service, handlers=[self._heard])
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(ASKERS):
                    group.create_task(self._ask())
                await self._look_again()
        finally:
            await browser.async_cancel()

    def _heard(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Called by the browser, on the loop, once the records of a packet are in its cache."""
        if state_change is ServiceStateChange.Removed:
            self._roster.forget(name)
        elif not self._take(name):
            self._wonder(name)

    def _wonder(self, name: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._questions.put_nowait(name)

    def _take(self, name: str) -> bool:
        """Enter what the cache holds of ``name``; False when something is missing there."""
        try:
            info = AsyncServiceInfo(self._service, name)
        except Error:
            return True
        complete = info.load_from_cache(self._zeroconf.zeroconf) and info.port is not None
        if complete:
            self._enter(name, self._read(info, self._local))
        return complete

    def _enter(self, name: str, sighting: Sighting | None) -> None:
        if sighting is None or sighting.cluster != self._cluster:
            self._roster.forget(name)
        elif not self._roster.put(name, sighting):
            log.debug("ignoring %s: %d workers are known already", name, MAX_ROSTER)

    async def _ask(self) -> None:
        """Ask for what is missing; who does not answer is gone."""
        while True:
            name = await self._questions.get()
            with contextlib.suppress(OSError, Error):
                info = AsyncServiceInfo(self._service, name)
                complete = await info.async_request(self._zeroconf.zeroconf, QUESTION_S * 1000)
                self._enter(name, self._read(info, self._local) if complete else None)

    async def _look_again(self) -> None:
        """Follow the interfaces, and ask after entries whose records ran out without a goodbye."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            now = interfaces()
            if now != self._local:
                self._local = now
                await follow_interfaces(self._zeroconf, None)
            for name in self._roster.names():
                if not self._take(name):
                    self._wonder(name)
