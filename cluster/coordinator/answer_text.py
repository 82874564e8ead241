"""Turn an answer's tokens into text: whole characters only, and nothing that could still become a stop string."""

from __future__ import annotations

from typing import Protocol


class Decoder(Protocol):
    """Decodes tokens to text, in whole characters."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of one answer, up to the first stop string, which is then in ``stopped_by``."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.stopped = False
        self.stopped_by = ""

    def add(self, token: int) -> str:
        """Return the text that became certain with this token; may be ""."""
        return self._emit(self._decoder.add(token), last=False)

    def flush(self) -> str:
        """Return the remaining text at the end of the answer."""
        return self._emit(self._decoder.flush(), last=True)

    def _emit(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [(i, s) for s in self._stop if (i := held.find(s)) >= 0]
        if found:
            first, self.stopped_by = min(found)
            self.stopped, self._held = True, ""
            return held[:first]
        keep = 0 if last else _possible_start(held, self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of a stop string."""
    longest = min(len(text), max((len(s) - 1 for s in stop), default=0))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
