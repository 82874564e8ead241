"""An answer on its way from the engine loop's thread to the task that serves its client.

Bounded: a client that leaves too many events unread loses its request, with the reason, and slows nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import TypeAlias

from cluster.core.errors import MacpipeError
from cluster.core.limits import MAX_UNREAD_EVENTS
from cluster.core.request import Accepted, FinishEvent, TokenEvent

Event = Accepted | TokenEvent | FinishEvent
Queue: TypeAlias = asyncio.Queue[Event | MacpipeError]


class EventBatch:
    """What one thread has for its answers' readers. It waits for ``deliver`` and goes out together: to wake an event
    loop costs a thread more than everything else that it does for a token.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Queue, Event | MacpipeError]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, queue: Queue, event: Event | MacpipeError) -> None:
        self._waiting.setdefault(loop, []).append((queue, event))

    def deliver(self) -> None:
        """Hand over all that was put."""
        waiting, self._waiting = self._waiting, {}
        for loop, events in waiting.items():
            with suppress(RuntimeError):  # a loop that is closed has no readers
                loop.call_soon_threadsafe(_hand_over, events)


class AnswerQueue:
    """Made on the event loop that reads it; written from the thread whose ``post`` it is. ``abandon`` ends its request
    early.

    It is over with the ``FinishEvent`` of each of its ``samples``.
    """

    def __init__(self, post: EventBatch, abandon: Callable[[], object] = lambda: None, samples: int = 1) -> None:
        self.abandon = abandon
        self._samples = samples
        self._post, self._loop = post, asyncio.get_running_loop()
        self._events: Queue = asyncio.Queue()
        self._written = self._read = self._repeated = 0

    def put(self, event: Event | MacpipeError) -> bool:
        """Post an event to the reader; False where the reader is too far behind to take more tokens."""
        unread = self._written - max(self._read, self._repeated)
        if isinstance(event, TokenEvent) and unread >= self._samples * MAX_UNREAD_EVENTS:
            return False
        self._put(event)
        return True

    def repeat(self, event: TokenEvent) -> None:
        """Post what was said before, ahead of everything new: it is there at once, however slow its reader is."""
        self._put(event)
        self._repeated = self._written

    def _put(self, event: Event | MacpipeError) -> None:
        self._written += 1
        self._post.put(self._loop, self._events, event)

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


def _hand_over(events: Iterable[tuple[Queue, Event | MacpipeError]]) -> None:
    for queue, event in events:
        queue.put_nowait(event)
