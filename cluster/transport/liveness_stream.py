"""A liveness stream beside each data stream: a connection that carries only pings, to detect a cut link in two seconds.

The data connection itself cannot tell a cut link from a slow one: a ping waits behind the megabytes sent before it,
which takes seconds at 10 Mbit/s. On this connection nothing is ahead of a ping.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.core.limits import CONNECT_TIMEOUT_S
from cluster.security.trust import Trust
from cluster.transport.grpc_setup import PING_S, liveness_channel
from cluster.transport.rich_errors import is_ping_timeout

PULSE = "/cluster.v1.StageService/Pulse"


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Why a liveness stream ended. ``is_silence``: the peer did not answer; it need not have exited."""

    reason: str
    is_silence: bool = False


def beat(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    """Handle the server's end: send one message, then keep the call open until the caller ends it."""
    ended = threading.Event()
    if context.add_callback(ended.set):
        yield b""
        ended.wait()


def default_ping_s() -> float:
    """Return the default timeout of a ping, in seconds, when no overload is known."""
    return PING_S


class LivenessStream:
    """The caller's end of a liveness stream.

    ``lost`` is called once, with gRPC's reason, when the stream ends without ``close``. ``silent`` is called before it
    if the reason is that pings are not answered.

    ``ping_s`` returns the timeout of a ping in seconds. If it has at least doubled since the connection was opened,
    because this machine turned out to be overloaded, silence proves nothing: the stream is opened again with the new
    timeout.
    """

    def __init__(
        self,
        trust: Trust,
        address: str,
        peer: str,
        lost: Callable[[str], None],
        silent: Callable[[], None],
        ping_s: Callable[[], float] = default_ping_s,
    ) -> None:
        self._trust = trust
        self._address = address
        self._peer = peer
        self._lost = lost
        self._silent = silent
        self._ping_s = ping_s
        self._closing = threading.Lock()
        self._closed = False
        self._open()
        threading.Thread(target=self._listen, name=f"pulse {address}", daemon=True).start()

    def _open(self) -> None:
        self._granted_s = self._ping_s()
        self._channel = liveness_channel(self._trust, self._address, self._peer, self._granted_s)
        self._call: Any = self._channel.unary_stream(PULSE, None, None)(b"", wait_for_ready=True)

    def _listen(self) -> None:
        end = self._wait_for_end()
        while end.is_silence and self._reopen():
            end = self._wait_for_end()
        if not self._closed:
            if end.is_silence:
                self._silent()
            self._lost(end.reason)

    def _wait_for_end(self) -> StreamEnd:
        """Wait for the end of the call. Return why it ended.

        Pings start with the connection, so a link that is cut before that is silent for as long as connecting may take.
        """
        first = threading.Event()
        limit = threading.Timer(CONNECT_TIMEOUT_S + self._granted_s - PING_S, self._channel.close)
        limit.daemon = True
        limit.start()
        try:
            for _ in self._call:
                first.set()
                limit.cancel()
        except grpc.RpcError as e:
            if e.code() is grpc.StatusCode.CANCELLED and not first.is_set():
                return StreamEnd("UNAVAILABLE: the liveness stream got no connection", is_silence=True)
            return StreamEnd(f"{e.code().name}: {e.details()}", is_silence=is_ping_timeout(e.details() or ""))
        finally:
            limit.cancel()
        return StreamEnd("the peer ended the liveness stream")

    def _reopen(self) -> bool:
        """Open the stream again with a longer timeout.

        Return False if the timeout has not doubled. Connecting is bounded as it was at first.
        """
        with self._closing:
            if self._closed or self._ping_s() < 2 * self._granted_s:
                return False
            self._channel.close()
            self._open()
        return True

    def close(self) -> None:
        with self._closing:
            self._closed = True
            self._channel.close()
