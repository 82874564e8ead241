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
from cluster.transport.options import pulse_channel

PULSE = "/cluster.v1.StageService/Pulse"
_UNANSWERED = "ping timeout"
"""In gRPC's reason, where the connection stands and says nothing; a process that is gone closes it."""


def beat(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    """The server's end: say one word, then keep the call open for as long as the caller does."""
    over = threading.Event()
    if context.add_callback(over.set):
        yield b""
        over.wait()


class Pulse:
    """The caller's end. ``lost`` is told once, with gRPC's reason, when it ends; ``silent`` before it, where that is
    because nobody answers pings any more.
    """

    def __init__(
        self, trust: Trust, address: str, peer: str, lost: Callable[[str], None], silent: Callable[[], None]
    ) -> None:
        self._lost, self._silent, self._closed = lost, silent, False
        self._channel = pulse_channel(trust, address, peer)
        self._call: Any = self._channel.unary_stream(PULSE, None, None)(b"", wait_for_ready=True)
        threading.Thread(target=self._listen, name=f"pulse {address}", daemon=True).start()

    def _listen(self) -> None:
        why = "it ended the pulse"
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as e:
            why = f"{e.code().name}: {e.details()}"
        if not self._closed:
            if _UNANSWERED in why:
                self._silent()
            self._lost(why)

    def close(self) -> None:
        self._closed = True
        self._call.cancel()
        self._channel.close()
