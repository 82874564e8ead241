"""A pulse beside each data stream: a connection that carries pings alone, so that a cut is seen in two seconds.

The data's own connection cannot tell a cut link from a slow one: a ping waits behind the megabytes that were sent
before it, seconds at 10 Mbit/s. Nothing is ever ahead of a ping here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from cluster.security.trust import Trust
from cluster.transport.grpc_setup import PING_S, pulse_channel

PULSE = "/cluster.v1.StageService/Pulse"
_UNANSWERED = "ping timeout"
"""In gRPC's reason, where the connection stands and says nothing; a process that is gone closes it."""


def beat(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    """The server's end: say one word, then keep the call open for as long as the caller does."""
    over = threading.Event()
    if context.add_callback(over.set):
        yield b""
        over.wait()


def usual() -> float:
    """Return what a ping's answer gets where no overload is known of."""
    return PING_S


class LivenessStream:
    """The caller's end. ``lost`` is told once, with gRPC's reason, when it ends; ``silent`` before it, where that is
    because nobody answers pings any more.

    ``ping_s`` is asked how many seconds a ping's answer may take. Where that has grown since the connection was opened,
    because this machine turned out to be overloaded, silence is no verdict: the pulse tries again with the new bound.
    """

    def __init__(
        self,
        trust: Trust,
        address: str,
        peer: str,
        lost: Callable[[str], None],
        silent: Callable[[], None],
        ping_s: Callable[[], float] = usual,
    ) -> None:
        self._trust, self._address, self._peer = trust, address, peer
        self._lost, self._silent, self._ping_s = lost, silent, ping_s
        self._closing = threading.Lock()
        self._closed = False
        self._open()
        threading.Thread(target=self._listen, name=f"pulse {address}", daemon=True).start()

    def _open(self) -> None:
        self._granted_s = self._ping_s()
        self._channel = pulse_channel(self._trust, self._address, self._peer, self._granted_s)
        self._call: Any = self._channel.unary_stream(PULSE, None, None)(b"", wait_for_ready=True)

    def _listen(self) -> None:
        while _UNANSWERED in (why := self._ended()) and self._opened_again():
            continue
        if not self._closed:
            if _UNANSWERED in why:
                self._silent()
            self._lost(why)

    def _ended(self) -> str:
        """Wait for the end of the call; gRPC's reason."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as e:
            return f"{e.code().name}: {e.details()}"
        return "it ended the pulse"

    def _opened_again(self) -> bool:
        """Try again with a longer bound; False where none is due, or the other end cannot be reached within it."""
        with self._closing:
            if self._closed or self._ping_s() < 2 * self._granted_s:
                return False
            self._channel.close()
            self._open()
            ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(self._granted_s)
        except grpc.FutureTimeoutError:
            return False
        return True

    def close(self) -> None:
        with self._closing:
            self._closed = True
            self._call.cancel()
            self._channel.close()
