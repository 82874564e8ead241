"""Announce a cluster's join port over Zeroconf, and look for it.

The announcement has only the cluster's name and id. The coordinator proves with its authority that it is the right one.
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
    """Announce the join port to Macs that want to join, during the block."""
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
    """Yield addresses that claim to admit to the cluster of this id, at most ``limits.MAX_ROSTER``; unverified."""
    async with listen(cluster_id, SERVICE, read_join_sighting, "look for the coordinator") as source:
        yield source


def read_join_sighting(info: AsyncServiceInfo, local: tuple[Interface, ...]) -> Sighting | None:
    """Return an announcement as a sighting whose ``cluster`` is the cluster's id; None if it is malformed."""
    cluster_id = (info.properties.get(b"id") or b"").decode("ascii", "replace")
    if not info.port or len(info.text or b"") > MAX_TXT_BYTES or not _ID.fullmatch(cluster_id):
        return None
    host = preferred_address(info.parsed_scoped_addresses(), local)
    return Sighting(format_address(host, info.port), cluster=cluster_id) if host else None
