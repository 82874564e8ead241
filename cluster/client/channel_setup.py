"""Sets up the client's gRPC channel: its identity, its cluster and its channel options."""

from __future__ import annotations

from typing import Final

import grpc

from cluster.core.follow_limits import FOLLOW_CONNECT_MS, FOLLOW_PING_MS, MAX_FOLLOW_PAUSE_S
from cluster.core.limits import CLIENT_KEEPALIVE_MS, CLIENT_KEEPALIVE_TIMEOUT_MS, CONNECT_TIMEOUT_S, MAX_CONTROL_BYTES
from cluster.core.text import parse_address
from cluster.platform.paths import state_home
from cluster.security.cluster_choice import resolve_cluster
from cluster.security.credentials import open_caller_trust
from cluster.security.trust import COORDINATOR, ChannelOptions, Trust

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.keepalive_time_ms", CLIENT_KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", CLIENT_KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", CLIENT_KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),  # also the timeout of one connection attempt
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", round(MAX_FOLLOW_PAUSE_S * 1000)),  # one that hands over opens its port anew
    ("grpc.enable_http_proxy", 0),  # the cluster is on the local network: ignore http_proxy
)

_IMPATIENT: Final = {
    "grpc.keepalive_timeout_ms": FOLLOW_PING_MS,
    "grpc.http2.ping_timeout_ms": FOLLOW_PING_MS,
    "grpc.min_reconnect_backoff_ms": FOLLOW_CONNECT_MS,
}
_IMPATIENT_OPTIONS: Final = tuple((name, _IMPATIENT.get(name, value)) for name, value in CHANNEL_OPTIONS)


def load_trust(cluster: str | None) -> Trust:
    """Return this machine's identity in ``cluster`` (else as ``resolve_cluster`` says) for calls to a coordinator."""
    home = state_home()
    return open_caller_trust(home, resolve_cluster(cluster, home))


def channel_credentials(
    trust: Trust, address: str, *, others: bool = False
) -> tuple[grpc.ChannelCredentials, ChannelOptions]:
    """Return channel credentials and options for the coordinator at ``address``. Raise as ``Trust.channel`` does.

    If there are ``others`` to try, a silent coordinator is given up sooner.
    """
    host, _ = parse_address(address)
    credentials, name_options = trust.channel(host, COORDINATOR)
    return credentials, [*(_IMPATIENT_OPTIONS if others else CHANNEL_OPTIONS), *name_options]
