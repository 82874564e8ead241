"""Announce a cluster's own host name, ``CLUSTER.local``, over mDNS: the addresses of the coordinator that leads.

Any program of the network can ask for it, so it proves nothing: callers verify the certificate that answers.
"""

from __future__ import annotations

import re
import secrets
from contextlib import AbstractAsyncContextManager
from typing import Final

from zeroconf.asyncio import AsyncServiceInfo

from cluster.discovery.announce import publish
from cluster.discovery.interfaces import Reach

NAME_TTL_S: Final = 5
"""How long others may remember the addresses. Another coordinator may lead by then, on another Mac."""
_SERVICE: Final = "_macpipe-leader._tcp.local."
_MAX_LABEL: Final = 63


def cluster_host_name(cluster: str) -> str:
    """Return the host name of a cluster's leader: ``my-lab.local`` for the cluster ``My_Lab``."""
    label = re.sub(r"[^a-z0-9]+", "-", cluster.lower()).strip("-")[:_MAX_LABEL].rstrip("-")
    return f"{label}.local"


def announce_cluster_name(cluster: str, host: str, port: int) -> AbstractAsyncContextManager[None]:
    """Announce that the leader of ``cluster`` listens on ``host``, during the block.

    It has the addresses and the interfaces that ``announce`` describes. Zeroconf answers for a host name only as that
    of a service; this one has the leader's gRPC ``port``.
    """
    unique = f"{secrets.token_hex(4)}.{_SERVICE}"

    def info(here: Reach) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            _SERVICE,
            unique,
            port=port,
            server=f"{cluster_host_name(cluster)}.",
            parsed_addresses=list(here.addresses),
            host_ttl=NAME_TTL_S,
            other_ttl=NAME_TTL_S,
        )

    return publish(info, host, "the cluster's name")
