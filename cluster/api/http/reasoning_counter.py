"""How many tokens of an answer were its reasoning: those generated before its content or a call began, marks and all.

Text says it too late or not at all (it waits for whole characters, for marks, for a call's end), so tokens are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cluster.core.request import FinishEvent, TokenEvent


class ReasoningCounter:
    """Counts for one sample. ``end`` are the token ids with which the model ends its reasoning; empty: it has none."""

    def __init__(self, end: Sequence[int] = ()) -> None:
        self._end = tuple(end)
        self._last: deque[int] = deque(maxlen=len(self._end))
        self._tokens = 0
        self._thought = self._over = False

    @property
    def tokens(self) -> int:
        """So far; 0 where the answer began with something else than reasoning."""
        return self._tokens if self._thought else 0

    def add(self, event: TokenEvent | FinishEvent) -> None:
        """The next event of this sample."""
        self._thought |= bool(event.reasoning)
        if self._over:
            return
        if event.text or event.calls:
            self._over = True
        elif isinstance(event, TokenEvent):
            self._tokens += 1
            self._last.append(event.token)
            self._over = bool(self._end) and tuple(self._last) == self._end
