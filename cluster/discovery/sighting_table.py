"""A bounded table of sightings. It does not know where they come from."""

from __future__ import annotations

import asyncio

from cluster.core.limits import MAX_ROSTER
from cluster.discovery.sighting import Sighting


class SightingTable:
    """A Source that can be written, keyed by the announced name. A new name is ignored while the table is full."""

    def __init__(self, limit: int = MAX_ROSTER) -> None:
        self._limit = limit
        self._seen: dict[str, Sighting] = {}
        self._changed = asyncio.Event()

    def put(self, name: str, sighting: Sighting) -> bool:
        """Add or replace a sighting; False if there is no room."""
        if name not in self._seen and len(self._seen) >= self._limit:
            return False
        if self._seen.get(name) != sighting:
            self._seen[name] = sighting
            self._changed.set()
        return True

    def forget(self, name: str) -> None:
        if self._seen.pop(name, None) is not None:
            self._changed.set()

    def names(self) -> tuple[str, ...]:
        return tuple(self._seen)

    def current(self) -> tuple[Sighting, ...]:
        self._changed.clear()
        return tuple(sorted(set(self._seen.values()), key=lambda s: (s.name, s.id, s.address, s.version)))

    async def changed(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
