"""Hold an answer's events back until the journal's records that came before them are stored on all copies.

Without standbys there is no gate. The module knows events and numbers of batches; it does not know who stores what.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeAlias

from cluster.core.errors import MacpipeError
from cluster.core.request import Accepted, FinishEvent, PromptLogprobs, SkippedText, TokenEvent

__all__ = ["AnswerEvent", "EventGate", "EventReader", "EventsOf", "deliver_events"]

AnswerEvent: TypeAlias = Accepted | PromptLogprobs | SkippedText | TokenEvent | FinishEvent


class EventReader(Protocol):
    """The queue of one answer, on its reader's event loop."""

    def receive(self, events: Sequence[AnswerEvent | MacpipeError]) -> None:
        """Take delivered events."""


EventsOf: TypeAlias = dict[EventReader, list[AnswerEvent | MacpipeError]]


class EventGate:
    """Delivers events in the order in which they came. ``newest`` returns the number of the last batch of records.

    Any thread may call it. The gate is bounded by what its readers may leave unread.
    """

    def __init__(self, newest: Callable[[], int]) -> None:
        self._newest = newest
        self._lock = threading.Lock()
        self._held = deque[tuple[int, asyncio.AbstractEventLoop, EventsOf]]()
        self._stored: float = -1
        self._last: float = math.inf
        self._ended: MacpipeError | None = None

    def deliver(self, loop: asyncio.AbstractEventLoop, events: EventsOf) -> None:
        """Deliver events to readers on ``loop``, once all batches so far are stored."""
        with self._lock:
            self._held.append((self._newest(), loop, events))
            self._release()

    def open_to(self, number: int) -> None:
        """Deliver what waits for batches up to this number. It never goes back."""
        with self._lock:
            self._stored = max(self._stored, min(number, self._last))
            self._release()

    def close_after(self, number: int) -> None:
        """Deliver nothing behind this batch, whatever is stored: later ones are recorded nowhere."""
        with self._lock:
            self._last = number

    def end(self, error: MacpipeError) -> None:
        """Deliver no event that is held, or that comes later: its reader gets ``error``, or the error that it held."""
        with self._lock:
            self._ended = error
            self._release()

    def _release(self) -> None:
        while self._held and (self._ended or self._held[0][0] <= self._stored):
            _, loop, events = self._held.popleft()
            if self._ended:
                error = self._ended
                events = {reader: [_error_of(found) or error] for reader, found in events.items()}
            deliver_events(loop, events)


def deliver_events(loop: asyncio.AbstractEventLoop, events: EventsOf) -> None:
    """Hand events to their readers on ``loop``, in one step."""
    with suppress(RuntimeError):  # a closed loop has no readers
        loop.call_soon_threadsafe(_hand_over, events)


def _hand_over(events: EventsOf) -> None:
    for reader, found in events.items():
        reader.receive(found)


def _error_of(events: Sequence[AnswerEvent | MacpipeError]) -> MacpipeError | None:
    return next((event for event in events if isinstance(event, MacpipeError)), None)
