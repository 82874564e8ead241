"""uvicorn's connection with a bound on silence: a client that does not come to the end of a request's head is let go.

uvicorn itself waits for the next request for so long, but for ever once its first byte is there, or before the first.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.limits import HEAD_TIMEOUT_S

__all__ = ["Impatient"]


class Impatient(H11Protocol):
    """One connection. Its clock runs while there is no request whose head is whole."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waits():
            self._start()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start(self) -> None:
        """Begin to count, unless that was begun: a byte now and then does not put the end off."""
        if self._clock is None:
            self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self._too_slow)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._clock = None
        if self._waits():
            self.transport.close()
