"""Turn an answer's tokens into text: whole characters only, and nothing that could still become a stop string.

If the answer is parsed, split it into reasoning, tool calls and content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.core.request import FinishReason, Parsing, Request
from cluster.model.answer_parser import Parsed


class Decoder(Protocol):
    """Decodes tokens to text, in whole characters."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Parser(Protocol):
    """Splits text into reasoning, tool calls and content. ``called`` is True once there was a tool call."""

    @property
    def called(self) -> bool: ...

    def add(self, text: str) -> Parsed: ...

    def flush(self, *, whole: bool) -> Parsed: ...


class Plain:
    """The parser of answers that are not parsed: all text is content."""

    called = False

    def add(self, text: str) -> Parsed:
        return Parsed(text=text)

    def flush(self, *, whole: bool) -> Parsed:
        return Parsed()


def make_plain(parsing: Parsing) -> Parser:
    """Return a ``Plain``; ``parsing`` is ignored."""
    return Plain()


class AnswerText:
    """The text of one answer, parsed if its request asks for it."""

    def __init__(self, request: Request, decoder: Decoder, parser: Callable[[Parsing], Parser]) -> None:
        self._text = TextStream(decoder, request.stop)
        self._parser: Parser = Plain() if request.parsing is None else parser(request.parsing)

    @property
    def stopped_by(self) -> str:
        """The stop string that appeared; "" if none did."""
        return self._text.stopped_by

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared; no text follows it."""
        return self._text.stopped

    def add(self, token: int) -> Parsed:
        """Return the output that became certain with this token."""
        return self._parser.add(self._text.add(token))

    def finish(self, reason: FinishReason) -> tuple[Parsed, FinishReason]:
        """Return the output held back so far and the final finish reason. ``reason`` is the scheduler's."""
        rest = self._parser.add(self._text.flush())
        if self.stopped:
            reason = FinishReason.STOP
        last = self._parser.flush(whole=reason is FinishReason.STOP and not self.stopped)
        if self._parser.called and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        return Parsed(rest.reasoning + last.reasoning, rest.text + last.text, rest.calls + last.calls), reason


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
