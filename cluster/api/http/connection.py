"""A client's HTTP connection: uvicorn's, with a timeout for each state in which an idle client could hold it."""

from __future__ import annotations

import asyncio
from typing import Any

import h11

from cluster.api.http.connection_limit import ConnectionLimit, ConnectionSlot
from cluster.core.limits import CLOSE_S, HEADER_TIMEOUT_S, LINGER_S
from cluster.security.h11_protocol import QuietProtocol


class Connection(QuietProtocol):
    """One connection with timeouts; it reports to ``limit`` whether ``slot`` waits for a request.

    The server calls ``sweep`` about once a second, which costs less than a timer for each of some thousand connections.
    """

    def __init__(self, limit: ConnectionLimit, slot: ConnectionSlot, **given: Any) -> None:
        super().__init__(**given)
        self._limit = limit
        self._slot = slot
        self._head_since: float | None = None
        """Loop time of the connection or of the current head's first bytes; None once the head is complete."""
        self._discarding_since: float | None = None
        """Loop time since which the rest of a request's body is discarded; None if none is."""
        self._idle_since: float | None = None
        """Loop time since which a connection with an answered request waits for the next one; None if it does not."""
        self._closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._slot.close = transport.abort
        self._head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.leave(self._slot)
        super().connection_lost(exc)

    def on_invalid_request(self) -> None:
        self._limit.invalid_requests += 1

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_state()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_state()

    def sweep(self, now: float) -> None:
        """Close the connection if its state has timed out; ``now`` is the loop's time."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > CLOSE_S:
                self.transport.abort()
        elif self._head_since is not None and now - self._head_since > HEADER_TIMEOUT_S:
            self._send_timeout()
        elif self._is_overdue(now):
            self.transport.close()

    def _is_overdue(self, now: float) -> bool:
        if self._discarding_since is not None:
            return now - self._discarding_since > LINGER_S
        return self._idle_since is not None and now - self._idle_since > self.timeout_keep_alive

    def _update_state(self) -> None:
        """Note since when the connection is in its state, and tell the limit whether it waits.

        The rest of an unread request body is discarded for at most ``LINGER_S``.
        """
        now = self.loop.time()
        if self.conn.their_state is not h11.IDLE:
            self._head_since = None
        elif self._head_since is None and self.conn.trailing_data[0]:
            self._head_since = now
        if not self._is_discarding_body():
            self._discarding_since = None
        elif self._discarding_since is None:
            self._discarding_since = now
        # uvicorn has a timer for this too, which the rest of a discarded body stops
        self._idle_since = now if self.conn.their_state is h11.IDLE and self._head_since is None else None
        if self.conn.their_state is h11.IDLE:
            self._limit.wait(self._slot, idle=self.cycle is not None)
        else:
            self._limit.serve(self._slot)

    def _is_discarding_body(self) -> bool:
        """Return whether the response is complete but the request's body is still arriving."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _send_timeout(self) -> None:
        """Send 408, if the incomplete head still allows a response, and close."""
        if self.conn.our_state is h11.IDLE:
            close = [(b"connection", b"close"), (b"content-length", b"0")]
            self.transport.write(self.conn.send(h11.Response(status_code=408, headers=close, reason=b"Late")) or b"")
            self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        self.transport.close()
