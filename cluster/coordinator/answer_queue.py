"""Pass an answer's events from the engine loop's thread to the task that serves the client.

The queue is bounded: if a client leaves too many events unread, its request ends with that reason. Other clients are
not slowed down.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from cluster.coordinator.event_gate import AnswerEvent, EventGate, EventReader, deliver_events
from cluster.core.errors import MacpipeError
from cluster.core.limits import MAX_UNREAD_EVENTS
from cluster.core.request import FinishEvent, PromptLogprobs, SkippedText, TokenEvent


class EventBatch:
    """Collects the events of one thread until ``deliver``.

    Events are delivered together because waking an event loop costs more than all other work for a token. A ``gate``
    holds them until their records are stored elsewhere, too.
    """

    def __init__(self) -> None:
        self.gate: EventGate | None = None
        self._waiting: dict[asyncio.AbstractEventLoop, dict[EventReader, list[AnswerEvent | MacpipeError]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, queue: EventReader, *events: AnswerEvent | MacpipeError) -> None:
        self._waiting.setdefault(loop, {}).setdefault(queue, []).extend(events)

    def deliver(self) -> None:
        """Deliver all collected events to their queues, in one step for each queue."""
        waiting = self._waiting
        self._waiting = {}
        deliver = self.gate.deliver if self.gate else deliver_events
        for loop, events in waiting.items():
            deliver(loop, events)


EndRequest = Callable[["AnswerQueue"], object]


class AnswerQueue:
    """The queue of one answer; iterate over it for the events up to the last ``FinishEvent``.

    Create and read it on one event loop; write it on the thread that owns ``post``. ``end`` ends the request of an
    answer that nobody reads any more.
    The answer is complete once each of its ``samples`` has a ``FinishEvent``.
    """

    def __init__(self, post: EventBatch, end: EndRequest = lambda _: None, samples: int = 1) -> None:
        self._end = end
        self.abandoned = False
        """Whether nobody reads it any more."""
        self._samples = self._unfinished = samples
        self._post, self._loop = post, asyncio.get_running_loop()
        self._events = deque[AnswerEvent | MacpipeError]()
        self._arrived = asyncio.Event()
        self._written = self._read = self._uncounted = 0

    def abandon(self) -> None:
        """End the request: nobody reads its answer any more."""
        self.abandoned = True
        self._end(self)

    def move(self, post: EventBatch, end: EndRequest) -> None:
        """Let another thread write the queue, whose request has moved there.

        Call it on the reader's event loop, once the old thread has delivered its last event.
        """
        self._post, self._end = post, end

    def fail(self, error: MacpipeError) -> None:
        """End the answer with an error, on the reader's event loop. No other thread may write the queue any more."""
        if self._post.gate:
            self._post.gate.deliver(self._loop, {self: [error]})  # behind the events that it holds
        else:
            self.receive([error])

    def put(self, event: AnswerEvent | MacpipeError) -> bool:
        """Send an event to the reader. Return False, and drop a token, if the reader is too far behind."""
        unread = self._written - max(self._read, self._uncounted)
        if isinstance(event, TokenEvent) and unread >= self._samples * MAX_UNREAD_EVENTS:
            return False
        self._put(event)
        return True

    def put_uncounted(self, *events: TokenEvent | PromptLogprobs | SkippedText) -> None:
        """Send events that do not count as unread: tokens of an earlier coordinator, or a piece of the prompt.

        Their number is bounded by the answer so far, and by the prompt.
        """
        self._put(*events)
        self._uncounted = self._written

    def _put(self, *events: AnswerEvent | MacpipeError) -> None:
        self._written += len(events)
        self._post.put(self._loop, self, *events)

    def receive(self, events: Sequence[AnswerEvent | MacpipeError]) -> None:
        """Take delivered events, on the reader's event loop."""
        self._events.extend(events)
        self._arrived.set()

    def __aiter__(self) -> AnswerQueue:
        return self

    async def __anext__(self) -> AnswerEvent:
        """Return the next event, up to the last ``FinishEvent``. Raises the error if one ended the request.

        The event loop runs before each event: thousands may be there already, and each costs its reader up to 0.2 ms.
        """
        if not self._unfinished:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._read += 1
        if isinstance(event, MacpipeError):
            raise event
        self._unfinished -= isinstance(event, FinishEvent)
        return event
