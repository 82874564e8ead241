"""uvicorn's HTTP/1.1 protocol for ports that strangers reach: their input cannot write to the log or raise in it.

uvicorn logs a warning for each invalid request and each requested upgrade. It also answers an invalid request while
another answer is under way, which raises in the event loop, with a traceback. The module does not interpret requests.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.core.limits import FREE_CHUNKS, MIN_CHUNK_BYTES

PIECE: Final = 16 * 1024
"""Bytes given to the parser at a time. The parser limits the size of a head only while the head is incomplete, so a
head has at most twice this size. 256 KiB at once could be 50,000 headers and hold the event loop for 60 ms."""
_log = logging.getLogger(__name__)
_log.setLevel(logging.ERROR)
"""Uvicorn's log of a connection. Its warnings are about the client: invalid requests and upgrades that are ignored."""


class ChunkCountingConnection(h11.Connection):
    """Parses one client's requests and refuses a body that comes in too many chunks for its length.

    A chunk costs the parser 3 us however short it is. A read of 256 KiB in chunks of one byte holds the event loop for
    170 ms, and a body of 16 MiB for as long as its client may take.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.refusal = ""
        """Why the body was refused; empty if it was not."""
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
        """Parse received bytes up to the end of a request that has no answer yet; the rest waits."""
        while self._unparsed and not self.transport.is_closing():
            if self.conn.their_state is h11.DONE:
                self.flow.pause_reading()
                return
            piece = bytes(self._unparsed[:PIECE])
            del self._unparsed[:PIECE]
            super().data_received(piece)

    def on_invalid_request(self) -> None:
        """Handle invalid HTTP of the client, whose connection is about to be closed. The default does nothing."""

    def send_400_response(self, msg: str) -> None:
        """Answer 400 unless an answer is under way, and close the connection in any case."""
        self.on_invalid_request()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(self.conn.refusal or msg)
        else:
            self.transport.close()
