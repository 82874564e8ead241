"""Where Macs are admitted: the join port of a cluster, announced and looked for over Zeroconf.

The announcement names the cluster and its id, nothing else. Who is found proves by its authority that it is the one.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator
from typing import Final

from zeroconf.asyncio import AsyncServiceInfo

from cluster.core.text import format_address
from cluster.discovery.announce import TTL_S, publish
from cluster.discovery.browse import MAX_TXT_BYTES, listen
from cluster.discovery.interfaces import Interface, Reach, preferred_address
from cluster.discovery.sighting import Sighting, Source

SERVICE: Final = "_macpipe-join._tcp.local."
_ID: Final = re.compile(r"[0-9a-f]{16}")


@contextlib.asynccontextmanager
async def announce_join(*, cluster: str, cluster_id: str, host: str, port: int) -> AsyncIterator[None]:
    """Be found by Macs that want to join, as ``discovery.announce`` is found by coordinators."""
    label = f"{re.sub(r'[^A-Za-z0-9]+', '-', cluster).strip('-')[:32] or 'cluster'}-{secrets.token_hex(4)}"

    def info(here: Reach) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE,
            f"{label}.{SERVICE}",
            port=port,
            properties={b"cluster": cluster.encode(), b"id": cluster_id.encode()},
            server=f"{label}.local.",
            parsed_addresses=list(here.addresses),
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )

    async with publish(info, host, "the join port"):
        yield


@contextlib.asynccontextmanager
async def look_for_join(cluster_id: str) -> AsyncIterator[Source]:
    """Addresses that say they admit to the cluster of this id, at most ``limits.MAX_ROSTER``. Anybody can say so."""
    async with listen(cluster_id, SERVICE, door_of, "look for the coordinator") as source:
        yield source


def door_of(info: AsyncServiceInfo, local: tuple[Interface, ...]) -> Sighting | None:
    """A stranger's announcement as a sighting, whose ``cluster`` is the cluster's id; None where it is malformed."""
    said = (info.properties.get(b"id") or b"").decode("ascii", "replace")
    if not info.port or len(info.text or b"") > MAX_TXT_BYTES or not _ID.fullmatch(said):
        return None
    host = preferred_address(info.parsed_scoped_addresses(), local)
    return Sighting(format_address(host, info.port), cluster=said) if host else None
