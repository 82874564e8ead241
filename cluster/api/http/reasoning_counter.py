"""Counts the reasoning tokens of an answer: all tokens before its content or first tool call, markers included.

It counts tokens, since text arrives late or not at all: text waits for whole characters, markers or a call's end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cluster.core.request import FinishEvent, TokenEvent


class ReasoningCounter:
    """Counts for one sample. ``end`` holds the token ids of the marker that ends reasoning; empty if there is none."""

    def __init__(self, end: Sequence[int] = ()) -> None:
        self._end = tuple(end)
        self._last: deque[int] = deque(maxlen=len(self._end))
        self._tokens = 0
        self._has_reasoning = False
        self._ended = False

    @property
    def tokens(self) -> int:
        """Reasoning tokens so far; 0 if the answer did not begin with reasoning."""
        return self._tokens if self._has_reasoning else 0

    def add(self, event: TokenEvent | FinishEvent) -> None:
        """Add the next event of this sample."""
        self._has_reasoning |= bool(event.reasoning)
        if self._ended:
            return
        if event.text or event.calls:
            self._ended = True
        elif isinstance(event, TokenEvent):
            self._tokens += 1
            self._last.append(event.token)
            self._ended = bool(self._end) and tuple(self._last) == self._end
