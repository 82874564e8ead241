"""Pass an answer's events from the engine loop's thread to the task that serves the client.

The queue is bounded: if a client leaves too many events unread, its request ends with that reason. Other clients are
not slowed down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeAlias

from cluster.core.errors import MacpipeError
from cluster.core.limits import MAX_UNREAD_EVENTS
from cluster.core.request import Accepted, FinishEvent, PromptLogprobs, SkippedText, TokenEvent

Event = Accepted | PromptLogprobs | SkippedText | TokenEvent | FinishEvent
Queue: TypeAlias = asyncio.Queue[Event | MacpipeError]


class EventBatch:
    """Collects the events of one thread until ``deliver``.

    Events are delivered together because waking an event loop costs more than all other work for a token.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Queue, Event | MacpipeError]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, queue: Queue, event: Event | MacpipeError) -> None:
        self._waiting.setdefault(loop, []).append((queue, event))

    def deliver(self) -> None:
        """Deliver all collected events to their queues."""
        waiting = self._waiting
        self._waiting = {}
        for loop, events in waiting.items():
            with suppress(RuntimeError):  # a closed loop has no readers
                loop.call_soon_threadsafe(_hand_over, events)


class AnswerQueue:
    """The queue of one answer; iterate over it for the events up to the last ``FinishEvent``.

    Create and read it on one event loop; write it on the thread that owns ``post``. ``abandon`` ends the request early.
    The answer is complete once each of its ``samples`` has a ``FinishEvent``.
    """

    def __init__(self, post: EventBatch, abandon: Callable[[], object] = lambda: None, samples: int = 1) -> None:
        self.abandon = abandon
        self._samples = self._unfinished = samples
        self._post, self._loop = post, asyncio.get_running_loop()
        self._events: Queue = asyncio.Queue()
        self._written = self._read = self._uncounted = 0

    def put(self, event: Event | MacpipeError) -> bool:
        """Send an event to the reader. Return False, and drop a token, if the reader is too far behind."""
        unread = self._written - max(self._read, self._uncounted)
        if isinstance(event, TokenEvent) and unread >= self._samples * MAX_UNREAD_EVENTS:
            return False
        self._put(event)
        return True

    def put_uncounted(self, event: TokenEvent | PromptLogprobs | SkippedText) -> None:
        """Send an event that does not count as unread: a token of an earlier coordinator, or a piece of the prompt.

        Their number is bounded by the answer so far, and by the prompt.
        """
        self._put(event)
        self._uncounted = self._written

    def _put(self, event: Event | MacpipeError) -> None:
        self._written += 1
        self._post.put(self._loop, self._events, event)

    def __aiter__(self) -> AnswerQueue:
        return self

    async def __anext__(self) -> Event:
        """Return the next event, up to the last ``FinishEvent``. Raises the error if one ended the request."""
        if not self._unfinished:
            raise StopAsyncIteration
        event = await self._events.get()
        self._read += 1
        if isinstance(event, MacpipeError):
            raise event
        self._unfinished -= isinstance(event, FinishEvent)
        return event


def _hand_over(events: Iterable[tuple[Queue, Event | MacpipeError]]) -> None:
    for queue, event in events:
        queue.put_nowait(event)
