"""Run work that grows with a request's size on one thread: counting, parsing, converting and packing.

Python computes in one thread at a time, so more threads would only delay the event loop. The module does not know what
the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple, Unpack

import anyio

from cluster.core.errors import Busy
from cluster.core.limits import MAX_PARSING_WAITING, RETRY_AFTER_S, SMALL_REQUEST_BYTES

__all__ = ["PARSING", "ParsingThread"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ParsingThread:
    """Runs one piece of work at a time, in the order of arrival. At most ``waiting`` pieces wait."""

    def __init__(self, waiting: int = MAX_PARSING_WAITING) -> None:
        self._max_waiting = waiting
        self._thread = anyio.CapacityLimiter(1)
        self._pending = 0
        """Pieces that run or wait. The limiter does not count those that have just arrived."""

    async def run(self, size: int, work: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        """Return ``work(*arguments)``, called directly if the request has at most ``SMALL_REQUEST_BYTES``.

        ``size`` is the request's size in bytes. Raises ``Busy`` if too much work waits, and what ``work`` raises.
        """
        if size <= SMALL_REQUEST_BYTES:
            return work(*arguments)
        if self._pending > self._max_waiting:
            raise Busy(
                f"{self._max_waiting} requests are waiting to be parsed; try again later", retry_after_s=RETRY_AFTER_S
            )
        self._pending += 1
        try:
            return await anyio.to_thread.run_sync(work, *arguments, limiter=self._thread)
        finally:
            self._pending -= 1


PARSING: Final = ParsingThread()
"""The thread for all requests of this process, over gRPC and HTTP."""
