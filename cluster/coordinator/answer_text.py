"""Text of an answer from its tokens: whole characters only, and nothing that could still become a stop string.

Where the answer is parsed, its reasoning and calls of tools are told from its content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.core.request import FinishReason, Parsing, Request
from cluster.model.answer_parser import Parsed


class Decoder(Protocol):
    """Tokens in, whole characters out."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Parser(Protocol):
    """Text in, what it turned out to be out. ``called``: there was a call of a tool in it."""

    @property
    def called(self) -> bool: ...

    def add(self, text: str) -> Parsed: ...

    def flush(self, *, whole: bool) -> Parsed: ...


class Plain:
    """The parser of answers that are not parsed: all is content."""

    called = False

    def add(self, text: str) -> Parsed:
        return Parsed(text=text)

    def flush(self, *, whole: bool) -> Parsed:
        return Parsed()


def make_plain(parsing: Parsing) -> Parser:
    """What makes a ``Plain``, whatever is asked for."""
    return Plain()


class AnswerText:
    """What one answer says, from its tokens."""

    def __init__(self, request: Request, decoder: Decoder, parser: Callable[[Parsing], Parser]) -> None:
        self._text = TextStream(decoder, request.stop)
        self._parser: Parser = Plain() if request.parsing is None else parser(request.parsing)

    @property
    def stopped_by(self) -> str:
        """The stop string that came up; empty where none did."""
        return self._text.stopped_by

    @property
    def stopped(self) -> bool:
        """A stop string has appeared: nothing more is said."""
        return self._text.stopped

    def add(self, token: int) -> Parsed:
        """What became certain with this token."""
        return self._parser.add(self._text.add(token))

    def finish(self, reason: FinishReason) -> tuple[Parsed, FinishReason]:
        """What was held back, and why the answer is over, of which ``reason`` is what the schedule knows."""
        rest = self._parser.add(self._text.flush())
        if self.stopped:
            reason = FinishReason.STOP
        last = self._parser.flush(whole=reason is FinishReason.STOP and not self.stopped)
        if self._parser.called and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        return Parsed(rest.reasoning + last.reasoning, rest.text + last.text, rest.calls + last.calls), reason


class TextStream:
    """The text of one answer. Once a stop string has appeared, ``stopped_by`` is it and nothing more comes out."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.stopped = False
        self.stopped_by = ""

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
        found = [(i, s) for s in self._stop if (i := held.find(s)) >= 0]
        if found:
            first, self.stopped_by = min(found)
            self.stopped, self._held = True, ""
            return held[:first]
        keep = 0 if last else _possible_start(held, self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` with which a stop string could begin."""
    longest = min(len(text), max((len(s) - 1 for s in stop), default=0))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
