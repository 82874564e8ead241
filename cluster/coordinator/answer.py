"""An answer on its way from the engine loop's thread to the task that serves its client.

Bounded: a client that leaves too many events unread loses its request, with the reason, and slows nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from cluster.errors import MacpipeError
from cluster.limits import MAX_UNREAD_EVENTS
from cluster.types import Accepted, FinishEvent, TokenEvent

Event = Accepted | TokenEvent | FinishEvent


class Answer:
    """Made on the event loop that reads it; written from one other thread. ``abandon`` ends its request early.

    It is over with the ``FinishEvent`` of each of its ``samples``.
    """

    def __init__(self, abandon: Callable[[], object] = lambda: None, samples: int = 1) -> None:
        self.abandon = abandon
        self._samples = samples
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | MacpipeError] = asyncio.Queue()
        self._written = self._read = 0

    def put(self, event: Event | MacpipeError) -> bool:
        """Hand an event to the reader; False where the reader is too far behind to take more tokens."""
        if isinstance(event, TokenEvent) and self._written - self._read >= self._samples * MAX_UNREAD_EVENTS:
            return False
        self._written += 1
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        return True

    async def events(self) -> AsyncIterator[Event]:
        """Everything up to the last ``FinishEvent``. Raises the error that ended the request instead."""
        unfinished = self._samples
        while unfinished:
            event = await self._events.get()
            self._read += 1
            if isinstance(event, MacpipeError):
                raise event
            unfinished -= isinstance(event, FinishEvent)
            yield event
