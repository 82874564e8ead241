"""Listen for announcements over Zeroconf and keep a table of those that belong to one cluster.

Nothing that is announced is trusted: malformed announcements are ignored, and everything that grows is bounded.
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
"""Our four fields need 600; a longer record is not ours."""
QUESTION_S: Final = 3.0
"""How long to wait for the rest of an announcement that arrived in pieces."""
ASKERS: Final = 8
Reader = Callable[[AsyncServiceInfo, tuple[Interface, ...]], Sighting | None]
"""Returns the sighting of a complete announcement; None if it is malformed or has no usable address."""


@contextlib.asynccontextmanager
async def browse(cluster: str) -> AsyncIterator[Source]:
    """Yield what is announced for ``cluster`` on any interface, loopback included, during the block.

    Without multicast this logs a warning and finds nothing.
    """
    async with listen(cluster, txt.SERVICE, read_sighting, "look for workers") as source:
        yield source


@contextlib.asynccontextmanager
async def listen(cluster: str, service: str, read: Reader, purpose: str) -> AsyncIterator[Source]:
    """Do as ``browse`` does, for announcements of ``service``, which ``read`` turns into sightings."""
    table = SightingTable()
    zeroconf = open_multicast(None, purpose)
    if zeroconf is None:
        yield table
        return
    try:
        listener = _Listener(zeroconf, cluster, table, service, read)
        async with alongside(listener.run()):
            yield table
    finally:
        await close_multicast(zeroconf)


def read_sighting(info: AsyncServiceInfo, local: tuple[Interface, ...]) -> Sighting | None:
    """Return the sighting of a complete announcement; None if it is malformed or has no usable address."""
    if not info.port or len(info.text or b"") > MAX_TXT_BYTES:
        return None
    fields = txt.read(info.properties)
    host = preferred_address(info.parsed_scoped_addresses(), local)
    if fields is None or not host:
        return None
    return Sighting(format_address(host, info.port), fields.id, fields.name, fields.version, fields.cluster)


class _Listener:
    """Turns the browser's events into entries of a table."""

    def __init__(
        self,
        zeroconf: AsyncZeroconf,
        cluster: str,
        table: SightingTable,
        service: str = txt.SERVICE,
        read: Reader = read_sighting,
    ) -> None:
        self._zeroconf = zeroconf
        self._service, self._read = service, read
        self._cluster = cluster
        self._table = table
        self._local = interfaces()
        # Names to resolve. When the queue is full, a further name waits until it is announced again.
        self._questions: asyncio.Queue[str] = asyncio.Queue(MAX_ROSTER)

    async def run(self) -> None:
        with contextlib.suppress(Error):
            await self._zeroconf.zeroconf.async_wait_for_start()
        browser = AsyncServiceBrowser(self._zeroconf.zeroconf, self._service, handlers=[self._on_change])
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(ASKERS):
                    group.create_task(self._resolve_names())
                await self._refresh()
        finally:
            await browser.async_cancel()

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Handle a change. The browser calls this on the loop once the records of a packet are in its cache."""
        if state_change is ServiceStateChange.Removed:
            self._table.forget(name)
        elif not self._update_from_cache(name):
            self._request_resolution(name)

    def _request_resolution(self, name: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._questions.put_nowait(name)

    def _update_from_cache(self, name: str) -> bool:
        """Enter the cached announcement of ``name``. Returns False if a record is missing."""
        try:
            info = AsyncServiceInfo(self._service, name)
        except Error:
            return True
        complete = info.load_from_cache(self._zeroconf.zeroconf) and info.port is not None
        if complete:
            self._update(name, self._read(info, self._local))
        return complete

    def _update(self, name: str, sighting: Sighting | None) -> None:
        if sighting is None or sighting.cluster != self._cluster:
            self._table.forget(name)
        elif not self._table.put(name, sighting):
            log.debug("announcement: ignored, the table is full name=%s workers=%d", name, MAX_ROSTER)

    async def _resolve_names(self) -> None:
        """Ask for missing records. A name that does not answer is forgotten."""
        while True:
            name = await self._questions.get()
            with contextlib.suppress(OSError, Error):
                info = AsyncServiceInfo(self._service, name)
                complete = await info.async_request(self._zeroconf.zeroconf, QUESTION_S * 1000)
                self._update(name, self._read(info, self._local) if complete else None)

    async def _refresh(self) -> None:
        """Follow the interfaces, and resolve entries whose records expired without a goodbye."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            now = interfaces()
            if now != self._local:
                self._local = now
                await follow_interfaces(self._zeroconf, None)
            for name in self._table.names():
                if not self._update_from_cache(name):
                    self._request_resolution(name)
