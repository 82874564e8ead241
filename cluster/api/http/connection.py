"""One client's connection: uvicorn's own, with an end to each state in which a client could keep it for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import h11

from cluster.api.http.connection_limit import ConnectionLimit, ConnectionSlot
from cluster.core.limits import CLOSE_S, HEADER_TIMEOUT_S, LINGER_S
from cluster.security.quiet_h11 import QuietProtocol


class Connection(QuietProtocol):
    """``sweep`` is called every second or so: a timer for each of some thousand connections would cost more.

    ``limit`` is told whether ``slot`` owes a request.
    """

    def __init__(self, limit: ConnectionLimit, slot: ConnectionSlot, **given: Any) -> None:
        super().__init__(**given)
        self._limit, self._slot = limit, slot
        self._head_since: float | None = None
        self._refused_since: float | None = None
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
        if self.conn.their_state is not h11.IDLE:
            self._head_since = None
        elif self._head_since is None and self.conn.trailing_data[0]:
            self._head_since = self.loop.time()
        if self._refused_since is not None and not self._body_due():
            self._refused_since = None
            self._await_next()
        self._update_slot()

    def on_response_complete(self) -> None:
        """The answer is out. What the client still sends of a request that was not read is thrown away for a while."""
        super().on_response_complete()
        if self._body_due():
            self._refused_since = self.loop.time()
        self._update_slot()

    def sweep(self, now: float) -> None:
        """Close what has waited too long; ``now`` is the loop's time."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > CLOSE_S:
                self.transport.abort()
        elif self._head_since is not None and now - self._head_since > HEADER_TIMEOUT_S:
            self._say_late()
        elif self._refused_since is not None and now - self._refused_since > LINGER_S:
            self.transport.close()

    def _update_slot(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self._limit.wait(self._slot, idle=self.cycle is not None)
        else:
            self._limit.serve(self._slot)

    def _body_due(self) -> bool:
        """Whether the answer is out, and the body of its request is not in. What comes then is the next request."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _await_next(self) -> None:
        """Arm uvicorn's timer anew, which the body that was thrown away has stopped, unless a request came with it."""
        if self.conn.their_state is h11.IDLE and self._head_since is None:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _say_late(self) -> None:
        """408, if the head that has begun allows an answer."""
        if self.conn.our_state is h11.IDLE:
            close = [(b"connection", b"close"), (b"content-length", b"0")]
            self.transport.write(self.conn.send(h11.Response(status_code=408, headers=close, reason=b"Late")) or b"")
            self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        self.transport.close()
