"""The bounded table of what has been seen. It knows nothing of where its entries come from."""

from __future__ import annotations

import asyncio

from cluster.core.limits import MAX_ROSTER
from cluster.discovery.sighting import Sighting


class SightingTable:
    """A Source to write into, keyed by the name under which a sighting came. When it is full, newcomers are ignored."""

    def __init__(self, limit: int = MAX_ROSTER) -> None:
        self._limit = limit
        self._seen: dict[str, Sighting] = {}
        self._news = asyncio.Event()

    def put(self, name: str, sighting: Sighting) -> bool:
        """Enter or replace; False when there is no room."""
        if name not in self._seen and len(self._seen) >= self._limit:
            return False
        if self._seen.get(name) != sighting:
            self._seen[name] = sighting
            self._news.set()
        return True

    def forget(self, name: str) -> None:
        if self._seen.pop(name, None) is not None:
            self._news.set()

    def names(self) -> tuple[str, ...]:
        return tuple(self._seen)

    def current(self) -> tuple[Sighting, ...]:
        self._news.clear()
        return tuple(sorted(set(self._seen.values()), key=lambda s: (s.name, s.id, s.address, s.version)))

    async def changed(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True
