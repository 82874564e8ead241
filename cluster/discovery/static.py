"""Named peers as a source of sightings, and several sources merged into one. It does no networking."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_ROSTER
from cluster.core.text import format_address, parse_address
from cluster.discovery.sighting import Sighting, Source


def static_source(peers: Sequence[str]) -> Source:
    """Return a source of ``host:port`` addresses in this order. Raises InvalidOption if invalid or too many."""
    addresses = dict.fromkeys(format_address(*parse_address(peer)) for peer in peers)
    if len(addresses) > MAX_ROSTER:
        raise InvalidOption(f"{len(addresses)} peers were named; name at most {MAX_ROSTER}")
    return _Static(tuple(Sighting(address) for address in addresses))


def merge_sources(*sources: Source) -> Source:
    """Return all sources' sightings in the order of the sources, one per address; one with an id takes precedence."""
    return _Merged(sources)


class _Static:
    def __init__(self, sightings: tuple[Sighting, ...]) -> None:
        self._sightings = sightings

    def current(self) -> tuple[Sighting, ...]:
        return self._sightings

    async def changed(self, timeout_s: float) -> bool:
        await anyio.sleep(timeout_s)
        return False


class _Merged:
    def __init__(self, sources: tuple[Source, ...]) -> None:
        self._sources = sources

    def current(self) -> tuple[Sighting, ...]:
        found: dict[str, Sighting] = {}
        for sighting in (s for source in self._sources for s in source.current()):
            known = found.get(sighting.address)
            if known is None or (sighting.id and not known.id):
                found[sighting.address] = sighting
        return tuple(found.values())[:MAX_ROSTER]

    async def changed(self, timeout_s: float) -> bool:
        found_change = False

        async def watch(source: Source) -> None:
            nonlocal found_change
            if await source.changed(timeout_s):
                found_change = True
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for source in self._sources:
                group.start_soon(watch, source)
        return found_change
