"""uvicorn's HTTP/1.1 protocol for ports that strangers reach: what they send cannot write to the log or raise in it.

uvicorn warns of each invalid request and each upgrade that is asked for, and answers an invalid one even where an
answer is under way, which raises in the event loop, with a traceback. It refuses to know what a request means.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.core.limits import FREE_CHUNKS, MIN_CHUNK_BYTES

PIECE: Final = 16 * 1024
"""Bytes given to the parser at a time. It bounds a head, to as much, only while the head is incomplete: so a head has
at most twice that, where 256 KiB that came at once would be 50,000 headers and hold the event loop for 60 ms."""
_log = logging.getLogger(__name__)
_log.setLevel(logging.ERROR)
"""Uvicorn's log of a connection. Its warnings are about the client: invalid requests and upgrades that are ignored."""


class ChunkCountingConnection(h11.Connection):
    """Parse one client's requests, and refuse a body that comes in too many chunks for its length.

    A chunk costs the parser 3 us however short it is: a read of 256 KiB in chunks of one byte keeps the event loop for
    170 ms, and a body of 16 MiB for as long as its client may take.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.refusal = ""
        """Why the body was refused; empty while it was not."""
        self._chunks = self._bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event as ``h11.Connection`` does. Raises ``h11.RemoteProtocolError``."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if (self._chunks - FREE_CHUNKS) * MIN_CHUNK_BYTES > self._bytes:
                self.refusal = f"The chunks of the body are too short: send chunks of {MIN_CHUNK_BYTES} bytes or more."
                raise h11.RemoteProtocolError(self.refusal)
        elif isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        return event


class QuietProtocol(H11Protocol):
    """One connection. Subclasses may count its invalid requests in ``on_invalid_request``."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.conn: ChunkCountingConnection = ChunkCountingConnection(h11.SERVER)
        self.logger = _log
        self._unparsed = bytearray()

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        self._parse()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._parse()

    def _parse(self) -> None:
        """Parse what came, up to the end of a request that is still to be answered; what follows it waits."""
        while self._unparsed and not self.transport.is_closing():
            if self.conn.their_state is h11.DONE:
                self.flow.pause_reading()
                return
            piece = bytes(self._unparsed[:PIECE])
            del self._unparsed[:PIECE]
            super().data_received(piece)

    def on_invalid_request(self) -> None:
        """Note that the client sent what is not HTTP; its connection is closed."""

    def send_400_response(self, msg: str) -> None:
        """Answer 400 where no answer is under way, and close the connection in any case."""
        self.on_invalid_request()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(self.conn.refusal or msg)
        else:
            self.transport.close()
