"""How the client's gRPC connection is set up: as whom, in which cluster, and with which of grpc's options."""

from __future__ import annotations

import os
from typing import Final

import grpc

from cluster.core.limits import CLIENT_KEEPALIVE_MS, CLIENT_KEEPALIVE_TIMEOUT_MS, CONNECT_TIMEOUT_S, MAX_CONTROL_BYTES
from cluster.core.text import parse_address
from cluster.platform.paths import state_home
from cluster.security.credentials import open_trust
from cluster.security.trust import ADMIN, CLIENT, COORDINATOR, Options, Trust

CLUSTER_VARIABLE: Final = "MACPIPE_CLUSTER"
DEFAULT_CLUSTER: Final = "default"
CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.keepalive_time_ms", CLIENT_KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", CLIENT_KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", CLIENT_KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),  # also the longest wait for one connect
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),
    ("grpc.enable_http_proxy", 0),  # the cluster is on this network: http_proxy is for elsewhere
)


def trust_in(cluster: str | None) -> Trust:
    """As whom this machine asks in ``cluster``, else in that of ``MACPIPE_CLUSTER``: an admin, a client, or nobody."""
    return open_trust(state_home(), cluster or os.environ.get(CLUSTER_VARIABLE) or DEFAULT_CLUSTER, ADMIN, CLIENT)


def means(trust: Trust, address: str) -> tuple[grpc.ChannelCredentials, Options]:
    """Credentials and options for the coordinator at ``address``. Raises as ``Trust.channel`` does."""
    credentials, named = trust.channel(parse_address(address)[0], COORDINATOR)
    return credentials, [*CHANNEL_OPTIONS, *named]
