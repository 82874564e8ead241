"""Announce a coordinator's gRPC port over Zeroconf, and look for it.

The announcement has only the cluster's id. Whoever finds it must verify by TLS that the cluster's coordinator answers.
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

SERVICE: Final = "_macpipe-grpc._tcp.local."
_ID: Final = re.compile(r"[0-9a-f]{16}")


@contextlib.asynccontextmanager
async def announce_coordinator(*, cluster_id: str, host: str, port: int) -> AsyncIterator[None]:
    """Announce the coordinator that listens on ``host`` and ``port`` to the cluster's other Macs, during the block."""
    label = f"coordinator-{secrets.token_hex(4)}"

    def info(here: Reach) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE,
            f"{label}.{SERVICE}",
            port=port,
            properties={b"id": cluster_id.encode()},
            server=f"{label}.local.",
            parsed_addresses=list(here.addresses),
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )

    async with publish(info, host, "the coordinator"):
        yield


@contextlib.asynccontextmanager
async def look_for_coordinator(cluster_id: str) -> AsyncIterator[Source]:
    """Yield addresses that claim to be the coordinator of the cluster with this id, at most ``MAX_ROSTER``."""
    async with listen(cluster_id, SERVICE, read_coordinator_sighting, "look for the coordinator") as source:
        yield source


def read_coordinator_sighting(info: AsyncServiceInfo, local: tuple[Interface, ...]) -> Sighting | None:
    """Return an announcement as a sighting whose ``cluster`` is the cluster's id; None if it is malformed."""
    cluster_id = (info.properties.get(b"id") or b"").decode("ascii", "replace")
    if not info.port or len(info.text or b"") > MAX_TXT_BYTES or not _ID.fullmatch(cluster_id):
        return None
    host = preferred_address(info.parsed_scoped_addresses(), local)
    return Sighting(format_address(host, info.port), cluster=cluster_id) if host else None
