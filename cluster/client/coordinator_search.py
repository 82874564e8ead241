"""Finds the coordinator of a cluster: where it was last, else on this Mac's default port, else by its announcement.

Announcements prove nothing, so an address counts only if a TLS handshake shows the coordinator's certificate there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from cluster.core.limits import DEFAULT_COORDINATOR_PORT
from cluster.core.text import format_address, parse_address
from cluster.discovery.interfaces import LOOPBACK
from cluster.security.cluster_choice import remember_coordinator

SEARCH_S: Final = 3.0
"""Time for the whole search: an announcement is answered within a second."""
HANDSHAKE_S: Final = 1.0
"""Deadline of each step of a handshake with one address: Macs of a cluster are on one network."""
MAX_TRIED: Final = 8
"""Addresses that one search tries; others may announce themselves too."""


def find_coordinator(home: Path, cluster: str, known: str) -> str:
    """Return ``known`` if the cluster's coordinator answers there, else the address at which it does.

    Return ``known`` also if it is found nowhere, so that the caller's own call names the error. Remember an address
    that is found. Blocks for at most ``SEARCH_S`` and four handshakes. Raises ``ClusterDamaged``.
    """
    from cluster.security.authority import read_authority
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.roles import Role, name_of

    folder = ClusterFolder(home, cluster)
    if not folder.exists:
        return known
    try:
        authority = read_authority(folder.authority.read_bytes())
        context = ssl.create_default_context(cadata=authority.certificate.decode())
    except (OSError, ValueError):
        return known  # the caller's own call explains the damage
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    name = name_of(Role.COORDINATOR, authority.cluster_id)

    def proves(address: str) -> bool:
        return _is_coordinator(address, context, name)

    if proves(known):
        return known
    default = format_address(LOOPBACK, DEFAULT_COORDINATOR_PORT)
    found = default if default != known and proves(default) else None
    if found is None:
        with ThreadPoolExecutor(1, "coordinator-search") as pool:  # the caller's thread may run an event loop
            found = pool.submit(lambda: asyncio.run(_search(authority.cluster_id, proves))).result()
    if found is None:
        return known
    remember_coordinator(home, cluster, found)
    return found


def _is_coordinator(address: str, context: ssl.SSLContext, name: str) -> bool:
    """Return whether ``address`` presents the certificate of ``name``. Nothing is sent to it but the handshake."""
    try:
        with (
            socket.create_connection(parse_address(address), HANDSHAKE_S) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            return True
    except OSError:  # also ssl.SSLError
        return False


async def _search(cluster_id: str, proves: Callable[[str], bool]) -> str | None:
    """Return the first announced address that ``proves`` accepts; None after ``SEARCH_S``."""
    from cluster.discovery.coordinator_announcement import look_for_coordinator

    tried: set[str] = set()
    async with look_for_coordinator(cluster_id) as source:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEARCH_S):
                while True:
                    for sighting in source.current():
                        if sighting.address not in tried and len(tried) < MAX_TRIED:
                            tried.add(sighting.address)
                            if await asyncio.to_thread(proves, sighting.address):
                                return sighting.address
                    await source.changed(SEARCH_S)
    return None
