"""Text of an answer from its tokens: whole characters only, and nothing that could still become a stop string."""

from __future__ import annotations

from typing import Protocol


class Decoder(Protocol):
    """Tokens in, whole characters out."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of one answer. Once a stop string has appeared, ``stopped`` is true and nothing more comes out."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became certain with this token, perhaps none."""
        return self._emit(self._decoder.add(token), last=False)

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        return self._emit(self._decoder.flush(), last=True)

    def _emit(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [i for i in (held.find(s) for s in self._stop) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = 0 if last else _possible_start(held, self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` with which a stop string could begin."""
    longest = min(len(text), max((len(s) - 1 for s in stop), default=0))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
