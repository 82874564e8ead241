"""Peers that a person named, and several sources seen as one. It knows no network."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_ROSTER
from cluster.core.text import format_address, parse_address
from cluster.discovery.sighting import Sighting, Source


def static_source(peers: Sequence[str]) -> Source:
    """The ``host:port`` addresses in the order given; raises InvalidOption for one that is none, or for too many."""
    addresses = dict.fromkeys(format_address(*parse_address(peer)) for peer in peers)
    if len(addresses) > MAX_ROSTER:
        raise InvalidOption(f"{len(addresses)} peers were named; at most {MAX_ROSTER} can be")
    return _Static(tuple(Sighting(address) for address in addresses))


def merge_sources(*sources: Source) -> Source:
    """Every source's sightings in the order of the sources: one for each address, and the one with an id wins."""
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
        news = False

        async def watch(source: Source) -> None:
            nonlocal news
            if await source.changed(timeout_s):
                news = True
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for source in self._sources:
                group.start_soon(watch, source)
        return news
