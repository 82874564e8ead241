"""Announce a coordinator's ports over Zeroconf, and look for them: gRPC for clients, the join port for new Macs.

An announcement has only the cluster's id, and the join port's its name. It proves nothing: clients verify by TLS that
the cluster's coordinator answers, and to a new Mac the coordinator proves it with its authority.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Final

from zeroconf.asyncio import AsyncServiceInfo

from cluster.core.text import format_address
from cluster.discovery.announce import TTL_S, publish
from cluster.discovery.browse import MAX_TXT_BYTES, listen
from cluster.discovery.interfaces import Interface, Reach, preferred_address
from cluster.discovery.sighting import Sighting, Source

GRPC_SERVICE: Final = "_macpipe-grpc._tcp.local."
JOIN_SERVICE: Final = "_macpipe-join._tcp.local."
_ID: Final = re.compile(r"[0-9a-f]{16}")


def announce_coordinator(*, cluster_id: str, host: str, port: int) -> AbstractAsyncContextManager[None]:
    """Announce the coordinator that listens on ``host`` and ``port`` to the cluster's other Macs, during the block."""
    return _announce(GRPC_SERVICE, "coordinator", {b"id": cluster_id.encode()}, host, port, "the coordinator")


def announce_join(*, cluster: str, cluster_id: str, host: str, port: int) -> AbstractAsyncContextManager[None]:
    """Announce the join port to Macs that want to join, during the block."""
    label = re.sub(r"[^A-Za-z0-9]+", "-", cluster).strip("-")[:32] or "cluster"
    properties = {b"cluster": cluster.encode(), b"id": cluster_id.encode()}
    return _announce(JOIN_SERVICE, label, properties, host, port, "the join port")


@contextlib.asynccontextmanager
async def look_for_coordinator(cluster_id: str, service: str = GRPC_SERVICE) -> AsyncIterator[Source]:
    """Yield addresses that claim to be this port of the coordinator of the cluster with this id; unverified.

    They are at most ``limits.MAX_ROSTER``.
    """
    async with listen(cluster_id, service, read_coordinator_sighting, "look for the coordinator") as source:
        yield source


def read_coordinator_sighting(info: AsyncServiceInfo, local: tuple[Interface, ...]) -> Sighting | None:
    """Return an announcement as a sighting whose ``cluster`` is the cluster's id; None if it is malformed."""
    cluster_id = (info.properties.get(b"id") or b"").decode("ascii", "replace")
    if not info.port or len(info.text or b"") > MAX_TXT_BYTES or not _ID.fullmatch(cluster_id):
        return None
    host = preferred_address(info.parsed_scoped_addresses(), local)
    return Sighting(format_address(host, info.port), cluster=cluster_id) if host else None


@contextlib.asynccontextmanager
async def _announce(
    service: str, label: str, properties: dict[bytes, bytes], host: str, port: int, what: str
) -> AsyncIterator[None]:
    """Announce a port under ``label`` and a random suffix during the block."""
    unique = f"{label}-{secrets.token_hex(4)}"

    def info(here: Reach) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            service,
            f"{unique}.{service}",
            port=port,
            properties=dict(properties),
            server=f"{unique}.local.",
            parsed_addresses=list(here.addresses),
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )

    async with publish(info, host, what):
        yield
