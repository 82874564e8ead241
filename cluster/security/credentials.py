"""Credentials for a channel or a server, chosen by the address.

On loopback both ends use gRPC's local credentials, whose server refuses a peer that is not on this machine. Off
loopback there is no cluster identity yet, so connections are neither authenticated nor encrypted: a server does that
only where a person named an address of the network with ``--host``.
"""

from __future__ import annotations

import ipaddress

import grpc


def is_loopback(host: str) -> bool:
    """Whether the address is this machine's own; a name other than ``localhost`` is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def server_credentials(host: str) -> grpc.ServerCredentials | None:
    """Credentials for listening on ``host``; None means plain TCP."""
    return grpc.local_server_credentials() if is_loopback(host) else None


def channel_credentials(host: str) -> grpc.ChannelCredentials | None:
    """Credentials for dialling ``host``; None means plain TCP."""
    return grpc.local_channel_credentials() if is_loopback(host) else None
