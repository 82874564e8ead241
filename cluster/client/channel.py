"""How the client's gRPC connection is set up. It knows grpc's option names; their values come from limits."""

from __future__ import annotations

from typing import Final

from cluster.limits import (
    CONNECT_TIMEOUT_S,
    KEEPALIVE_MS,
    KEEPALIVE_TIMEOUT_MS,
    MAX_CONTROL_BYTES,
)

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),  # also the longest wait for one connect
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),
    ("grpc.enable_http_proxy", 0),  # the cluster is on this network: http_proxy is for elsewhere
)
