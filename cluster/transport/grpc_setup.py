"""gRPC options, and the only functions that create a server, open a port or dial one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import grpc
import grpc.experimental
from grpc import aio

from cluster.core.errors import PortInUse
from cluster.core.follow_limits import FOLLOW_CONNECT_MS, FOLLOW_PING_MS
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
    MAX_ANSWER_BYTES,
    MAX_CALLS,
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    MAX_PEERS,
    MAX_STAGE_FIELDS,
    RECONNECT_MS,
)
from cluster.core.text import format_address, parse_address
from cluster.security.trust import ChannelOptions, Trust
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.message_bounds import MessageBounds
from cluster.v1 import store_pb2, worker_pb2

Channel = TypeVar("Channel")
PING_S: Final = KEEPALIVE_TIMEOUT_MS / 1000
"""Default timeout of a ping, in seconds, when no overload is known."""


def _options(
    max_bytes: int,
    keepalive_ms: int = KEEPALIVE_MS,
    timeout_ms: int = KEEPALIVE_TIMEOUT_MS,
    receive_bytes: int | None = None,
) -> ChannelOptions:
    """Return channel options. ``max_bytes`` limits messages sent, and those received unless ``receive_bytes`` does.

    ``timeout_ms`` limits a ping's answer too: keepalive's own limit noticed a stopped peer only after a minute.
    """
    return [
        ("grpc.max_receive_message_length", max_bytes if receive_bytes is None else receive_bytes),
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


_IDLE: ChannelOptions = [("grpc.max_connection_idle_ms", CONTROL_IDLE_MS)]
CONTROL_OPTIONS: ChannelOptions = [*_options(MAX_CONTROL_BYTES, KEEPALIVE_MS, CLIENT_KEEPALIVE_TIMEOUT_MS), *_IDLE]
"""For control ports. The timeout is long: heartbeats tell a worker whether its coordinator is alive, so a slow
coordinator need not be disconnected."""
_PUBLIC_OPTIONS: ChannelOptions = [
    *_options(MAX_CONTROL_BYTES, CLIENT_KEEPALIVE_MS, CLIENT_KEEPALIVE_TIMEOUT_MS),
    *_IDLE,
]
ONE_THREAD: ChannelOptions = [(grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
"""The thread that iterates over a stream reads from the connection itself. Otherwise one of gRPC's threads reads and
wakes the reader, which is half of a hop's wake-ups and a quarter of its time.

Such a call must be read to its end. One that is cancelled, or dropped before, keeps its connection and 100 KiB for
ever, since nobody reads its status. Close its channel instead: then the reader gets the status."""


def _data_options(receive_bytes: int) -> ChannelOptions:
    return [
        *_options(MAX_FRAME_BYTES, BULK_KEEPALIVE_MS, BULK_TIMEOUT_MS, receive_bytes),
        ("grpc.min_reconnect_backoff_ms", CONNECT_ATTEMPT_MS),
        # Identical channels would share one connection, and a bulk stream would delay a small one.
        ("grpc.use_local_subchannel_pool", 1),
    ]


DATA_OPTIONS: ChannelOptions = _data_options(MAX_FRAME_BYTES)
_CONTROL_SERVICES: Final = tuple(
    service for file in (worker_pb2, store_pb2) for service in file.DESCRIPTOR.services_by_name.values()
)
_MOST_FIELDS: Final = {worker_pb2.LoadStageRequest.DESCRIPTOR.full_name: MAX_STAGE_FIELDS}


def control_server(trust: Trust) -> aio.Server:
    """Return a server for calls within the cluster. ``trust`` authorizes every call. Bind it, then start it.

    Requests to workers and stores are counted and charged before they are parsed.
    """
    return aio.server(
        options=CONTROL_OPTIONS, interceptors=(*_authorization_interceptors(trust), control_bounds(trust))
    )


def control_bounds(trust: Trust) -> MessageBounds:
    """Return the interceptor that bounds requests to workers and stores."""
    return MessageBounds(_CONTROL_SERVICES, ByteBudget(), partial(_caller, trust), _MOST_FIELDS)


def _caller(trust: Trust, context: aio.ServicerContext[Any, Any]) -> str:
    """Return the caller: the party of its certificate, or a program at its address."""
    shown: Any = context.auth_context()
    party = trust.party(shown)
    return f"{party.role}.{party.id}" if party else context.peer().rpartition(":")[0]


def public_server(trust: Trust, *inner: aio.ServerInterceptor[Any, Any]) -> aio.Server:
    """Return a server for clients' calls, with longer keepalive times than ``control_server``.

    The interceptors ``inner`` run after authorization by ``trust``.
    """
    return aio.server(options=_PUBLIC_OPTIONS, interceptors=(*_authorization_interceptors(trust), *inner))


def _authorization_interceptors(trust: Trust) -> tuple[aio.ServerInterceptor[Any, Any], ...]:
    if not trust.me:
        return ()  # without an identity, only processes of this machine can connect
    from cluster.security.interceptors import AioAuthorizationInterceptor

    return (AioAuthorizationInterceptor(trust),)


def data_server(trust: Trust) -> tuple[grpc.Server, Callable[[], None]]:
    """Return a server for data streams, with a thread per stream, and a function to call after it has stopped.

    ``trust`` authorizes every stream. Bind the server, then start it.
    """
    threads = ThreadPoolExecutor(DATA_THREADS, thread_name_prefix="data")
    if not trust.me:
        return grpc.server(threads, options=DATA_OPTIONS), lambda: None
    from cluster.security.interceptors import AuthorizationInterceptor

    interceptor = AuthorizationInterceptor(trust)
    return grpc.server(threads, options=DATA_OPTIONS, interceptors=[interceptor]), interceptor.close


def bind(server: grpc.Server | aio.Server, trust: Trust, host: str, port: int) -> int:
    """Make the server listen on ``host:port``. Return the port, which the system chooses if ``port`` is 0.

    Raise ``PortInUse``, and ``InvalidOption`` if ``trust`` cannot authenticate callers at that address.
    """
    address = format_address(host, port)
    credentials = trust.server(host)
    try:
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as e:
        raise PortInUse(
            f"cannot listen on {address}: another program uses the port, or the address is not this machine's; "
            "choose another with --port and --host"
        ) from e


def data_channel(trust: Trust, address: str, peer: str, receive_bytes: int = MAX_FRAME_BYTES) -> grpc.Channel:
    """Return a channel to the data port of ``peer`` (see ``Trust.channel``), on its own connection.

    A received message may have ``receive_bytes``. Raises ``InvalidOption`` if the address is invalid, or if this
    process has no credentials for it.
    """
    return _dial(trust, address, peer, [*_data_options(receive_bytes), *ONE_THREAD], grpc.secure_channel)


def store_channel(trust: Trust, address: str, peer: str, receive_bytes: int) -> grpc.Channel:
    """Return a channel to the store of ``peer``, whose streams may be cancelled. Otherwise as ``data_channel``."""
    return _dial(trust, address, peer, _data_options(receive_bytes), grpc.secure_channel)


def liveness_channel(trust: Trust, address: str, peer: str, ping_s: float = PING_S) -> grpc.Channel:
    """Return a channel to a data port that carries only pings, with timeout ``ping_s``, on its own connection."""
    own_connection: ChannelOptions = [*ONE_THREAD, ("grpc.use_local_subchannel_pool", 1)]
    return _dial(trust, address, peer, [*_ping_options(ping_s), *own_connection], grpc.secure_channel)


def control_channel(trust: Trust, address: str, peer: str, ping_s: float = PING_S) -> aio.Channel:
    """Return a channel to a control port whose pings are answered within ``ping_s``. Raises as ``data_channel`` does.

    An answer may have MAX_ANSWER_BYTES.
    """
    return _dial(trust, address, peer, _ping_options(ping_s), aio.secure_channel)


def passing_channel(trust: Trust, address: str, peer: str) -> aio.Channel:
    """Return a channel on which a standby passes clients' calls on to ``peer``. Raises as ``data_channel`` does."""
    options = _options(MAX_CONTROL_BYTES, CLIENT_KEEPALIVE_MS, FOLLOW_PING_MS)
    impatient: ChannelOptions = [("grpc.min_reconnect_backoff_ms", FOLLOW_CONNECT_MS)]
    return _dial(trust, address, peer, [*options, *_IDLE, *impatient], aio.secure_channel)


def _ping_options(ping_s: float) -> ChannelOptions:
    patient: ChannelOptions = [("grpc.min_reconnect_backoff_ms", round(CONNECT_ATTEMPT_MS * ping_s / PING_S))]
    return [*_options(MAX_CONTROL_BYTES, KEEPALIVE_MS, round(ping_s * 1000), MAX_ANSWER_BYTES), *_IDLE, *patient]


def _dial(trust: Trust, address: str, peer: str, options: ChannelOptions, secure: Callable[..., Channel]) -> Channel:
    host, _ = parse_address(address)
    credentials, name_options = trust.channel(host, peer)
    return secure(address, credentials, options=[*options, *name_options])
