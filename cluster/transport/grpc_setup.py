"""gRPC options, and the only places where a server is made, a port opened, or one dialled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import grpc
import grpc.experimental
from grpc import aio

from cluster.core.errors import PortInUse
from cluster.core.limits import (
    BULK_KEEPALIVE_MS,
    BULK_TIMEOUT_MS,
    CLIENT_KEEPALIVE_MS,
    CLIENT_KEEPALIVE_TIMEOUT_MS,
    CONNECT_ATTEMPT_MS,
    CONTROL_IDLE_MS,
    DATA_THREADS,
    HANDSHAKE_S,
    KEEPALIVE_MS,
    KEEPALIVE_TIMEOUT_MS,
    MAX_CALLS,
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    MAX_PEERS,
    RECONNECT_MS,
)
from cluster.core.text import format_address, parse_address
from cluster.security.trust import Options, Trust

Channel = TypeVar("Channel")
PING_S: Final = KEEPALIVE_TIMEOUT_MS / 1000
"""What a ping's answer gets where no overload is known of."""


def _options(max_bytes: int, keepalive_ms: int = KEEPALIVE_MS, timeout_ms: int = KEEPALIVE_TIMEOUT_MS) -> Options:
    """``timeout_ms`` bounds a ping's answer too: keepalive's own bound alone noticed a stopped peer after a minute."""
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS // 10),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_CALLS),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S * 1000)),
        ("grpc.max_allowed_incoming_connections", MAX_PEERS),
    ]


_IDLE: Options = [("grpc.max_connection_idle_ms", CONTROL_IDLE_MS)]
CONTROL_OPTIONS: Options = [*_options(MAX_CONTROL_BYTES, KEEPALIVE_MS, CLIENT_KEEPALIVE_TIMEOUT_MS), *_IDLE]
"""Workers hear by heartbeats whether their coordinator lives, and need not cut a slow one off."""
_PUBLIC_OPTIONS: Options = [*_options(MAX_CONTROL_BYTES, CLIENT_KEEPALIVE_MS, CLIENT_KEEPALIVE_TIMEOUT_MS), *_IDLE]
_ONE_THREAD: Options = [(grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
"""Whoever iterates over a stream reads it off the connection itself. Else a thread of gRPC's reads, and wakes the
reader: half of a hop's wake-ups, and a quarter of its time."""
DATA_OPTIONS: Options = [
    *_options(MAX_FRAME_BYTES, BULK_KEEPALIVE_MS, BULK_TIMEOUT_MS),
    ("grpc.min_reconnect_backoff_ms", CONNECT_ATTEMPT_MS),
    # Identical channels would share one connection, and a bulk stream would delay a small one.
    ("grpc.use_local_subchannel_pool", 1),
]
DIAL_OPTIONS: Options = [*DATA_OPTIONS, *_ONE_THREAD]


def control_server(trust: Trust) -> aio.Server:
    """A server for calls within the cluster, which asks ``trust`` about every one of them. Bind it, then start it."""
    return aio.server(options=CONTROL_OPTIONS, interceptors=_guards(trust))


def public_server(trust: Trust, *inner: aio.ServerInterceptor[Any, Any]) -> aio.Server:
    """The same for clients' calls, more patient with those who do not answer for a while.

    The interceptors ``inner`` come after those that ask ``trust``.
    """
    return aio.server(options=_PUBLIC_OPTIONS, interceptors=(*_guards(trust), *inner))


def _guards(trust: Trust) -> tuple[aio.ServerInterceptor[Any, Any], ...]:
    if not trust.me:
        return ()  # all that connect are of this machine
    from cluster.security.interceptors import AioAuthorizationInterceptor

    return (AioAuthorizationInterceptor(trust),)


def data_server(trust: Trust) -> tuple[grpc.Server, Callable[[], None]]:
    """A server for data, a thread a stream, which asks ``trust`` about every one; what to call once it has stopped.

    Bind it, then start it.
    """
    threads = ThreadPoolExecutor(DATA_THREADS, thread_name_prefix="data")
    if not trust.me:
        return grpc.server(threads, options=DATA_OPTIONS), lambda: None
    from cluster.security.interceptors import AuthorizationInterceptor

    guard = AuthorizationInterceptor(trust)
    return grpc.server(threads, options=DATA_OPTIONS, interceptors=[guard]), guard.close


def bind(server: grpc.Server | aio.Server, trust: Trust, host: str, port: int) -> int:
    """Make the server listen on ``host:port``; the port that it got.

    Raises ``PortInUse``, and ``InvalidOption`` where nobody could be told from a stranger there.
    """
    address, credentials = format_address(host, port), trust.server(host)
    try:
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as e:
        raise PortInUse(
            f"cannot listen on {address}: another program uses the port, or the address is not this machine's; "
            "choose another with --port and --host"
        ) from e


def data_channel(trust: Trust, address: str, peer: str) -> grpc.Channel:
    """A connection of its own to the data port of ``peer`` (see ``Trust.channel``).

    Raises ``InvalidOption`` where the address makes no sense, or is out of this process's reach.
    """
    return _dial(trust, address, peer, DIAL_OPTIONS, grpc.secure_channel)


def pulse_channel(trust: Trust, address: str, peer: str, ping_s: float = PING_S) -> grpc.Channel:
    """A connection of its own to a data port on which nothing but pings travel, each to be answered in ``ping_s``."""
    alone: Options = [*_ONE_THREAD, ("grpc.use_local_subchannel_pool", 1)]
    return _dial(trust, address, peer, [*_pinging(ping_s), *alone], grpc.secure_channel)


def control_channel(trust: Trust, address: str, peer: str, ping_s: float = PING_S) -> aio.Channel:
    """A channel to a control port, where pings are answered in ``ping_s``. Raises as ``data_channel`` does."""
    return _dial(trust, address, peer, _pinging(ping_s), aio.secure_channel)


def _pinging(ping_s: float) -> Options:
    patient: Options = [("grpc.min_reconnect_backoff_ms", round(CONNECT_ATTEMPT_MS * ping_s / PING_S))]
    return [*_options(MAX_CONTROL_BYTES, KEEPALIVE_MS, round(ping_s * 1000)), *_IDLE, *patient]


def _dial(trust: Trust, address: str, peer: str, options: Options, secure: Callable[..., Channel]) -> Channel:
    host, _ = parse_address(address)
    credentials, named = trust.channel(host, peer)
    return secure(address, credentials, options=[*options, *named])
