"""An answer's text as it comes, told apart: reasoning, content, and calls of tools through mlx-lm's parsers.

Where a format lets them, a call's arguments are told as they come; it is a call from where they begin, whatever comes
of them. Else a call is parsed once it is whole. What turns out to be none (broken JSON, a tool that was not given, an
answer cut off inside) is content after all: nothing that the model said is lost but marks and the blanks around them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from cluster.core.request import Parsing, Tool, ToolCallDelta
from cluster.model.chat_template import describe_tool
from cluster.model.output_markers import OutputMarkers
from cluster.model.partial_tool_call import PartialToolCall

__all__ = ["AnswerParser", "Parsed"]

PIECE: Final = 64
"""Characters of arguments in one delta."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What became known with a piece of text, in this order."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class _In(Enum):
    REASONING = 0
    CONTENT = 1
    CALL = 2


@dataclass(slots=True)
class _Out:
    reasoning: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)

    def parsed(self) -> Parsed:
        return Parsed("".join(self.reasoning), "".join(self.text), tuple(self.calls))


class AnswerParser:
    """Takes the text of one answer in pieces. ``called``: a call was found, so the answer ends for its tools."""

    def __init__(self, marks: OutputMarkers, parsing: Parsing) -> None:
        self._marks, self._tools = marks, parsing.tools
        self._in = _In.REASONING if parsing.thinking else _In.CONTENT
        self._held = ""
        """Text that could still become a mark, or blanks that may not count."""
        self._fresh = parsing.thinking or bool(marks.think_start)
        """Nothing of the part has been said yet: blanks at its beginning do not count."""
        self._blanks = ""
        """Those before a call, which come back where it is none."""
        self._calls = 0
        self._names = frozenset(tool.name for tool in parsing.tools)
        self._open: PartialToolCall | None = None
        """The call that is being told."""

    @property
    def called(self) -> bool:
        return self._calls > 0

    def add(self, text: str) -> Parsed:
        """What became certain with this text."""
        out = _Out()
        self._held += text
        while self._step(out):
            pass
        return out.parsed()

    def flush(self, *, whole: bool) -> Parsed:
        """The rest. ``whole``: the model ended the answer itself, so that a call without an end mark may be one."""
        out = _Out()
        if self._in is _In.CALL:
            body, self._held = self._held, ""
            self._in = _In.CONTENT
            if not self._close_call(body, out) and not (whole and self._call(body, out)):
                self._say(self._blanks + self._marks.call_start + body, out)
        else:
            self._say(self._held, out, last=True)
            self._held = ""
        return out.parsed()

    def _step(self, out: _Out) -> bool:
        """Take what is held up to the next mark; False where more text is needed."""
        mark, at = self._next_mark()
        if at < 0:
            if self._in is _In.CALL:
                self._go_on(out)
            else:
                self._speak(out)
            return False
        before, self._held = self._held[:at], self._held[at + len(mark) :]
        self._pass(mark, before, out)
        return True

    def _pass(self, mark: str, before: str, out: _Out) -> None:
        """A mark came up, after ``before``."""
        if self._in is _In.CALL:
            self._in = _In.CONTENT
            if not self._close_call(before, out) and not self._call(before, out):
                self._say(self._blanks + self._marks.call_start + before + self._marks.call_end, out)
            return
        if mark in self._marks.noise:
            self._held = before + self._held
            return
        said = before.rstrip() if self._blanks_wait() else before
        self._say(said, out)
        self._blanks = "" if self._fresh else before[len(said) :]
        self._in = {
            self._marks.think_start: _In.REASONING,
            self._marks.think_end: _In.CONTENT,
            self._marks.call_start: _In.CALL,
        }[mark]
        self._fresh = self._in is not _In.CALL

    def _marks_here(self) -> tuple[str, ...]:
        m = self._marks
        calls = (m.call_start,) if self._tools and m.call_start else ()
        match self._in:
            case _In.CALL:
                return (m.call_end,) if m.call_end else ()
            case _In.REASONING:
                return (m.think_end, *calls, *m.noise)
            case _In.CONTENT:
                return (*((m.think_start,) if m.think_start else ()), *calls, *m.noise)

    def _next_mark(self) -> tuple[str, int]:
        """The mark that comes first, the longest where several begin there, and where; "" and -1 for none."""
        found = [(at, -len(mark), mark) for mark in self._marks_here() if (at := self._held.find(mark)) >= 0]
        at, _, mark = min(found, default=(-1, 0, ""))
        return mark, at

    def _speak(self, out: _Out) -> None:
        """Say what cannot be part of a mark any more; blanks at the end wait for what follows them."""
        keep = _possible_start(self._held, self._marks_here())
        sure = self._held[: len(self._held) - keep]
        said = sure.rstrip() if self._blanks_wait() else sure
        self._held = self._held[len(said) :]
        self._say(said, out)

    def _blanks_wait(self) -> bool:
        """Whether blanks before the next mark would not count."""
        return self._in is _In.REASONING or bool(self._tools)

    def _say(self, text: str, out: _Out, *, last: bool = False) -> None:
        if self._fresh:
            text = text.lstrip()
        if last and (self._in is _In.REASONING or self.called):
            text = text.rstrip()
        if text:
            self._fresh = False
            (out.reasoning if self._in is _In.REASONING else out.text).append(text)

    def _go_on(self, out: _Out) -> None:
        """Tell what is certain of a call that has not ended."""
        self._held = self._open_call(self._held, out)
        if self._open:
            sure = len(self._held) - _possible_start(self._held, self._marks_here())
            self._argue(self._open.add(self._held[:sure]), out)
            self._held = self._held[sure:]

    def _open_call(self, body: str, out: _Out) -> str:
        """Tell whose call it is, as soon as that is known; what is left of ``body``."""
        if self._open or not (begun := PartialToolCall.begun(body, self._marks.format, self._names)):
            return body
        self._open, at = begun
        out.calls.append(ToolCallDelta(self._calls, _new_id(), self._open.name))
        self._calls += 1
        return body[at:]

    def _close_call(self, body: str, out: _Out) -> bool:
        """The end of a call, before which ``body`` stands; False where nothing of it was told."""
        rest = self._open_call(body, out)
        if not self._open:
            return False
        self._argue(self._open.add(rest), out)
        self._open, self._fresh = None, True
        return True

    def _argue(self, arguments: str, out: _Out) -> None:
        if arguments:
            out.calls.append(ToolCallDelta(self._calls - 1, arguments=arguments))

    def _call(self, body: str, out: _Out) -> bool:
        """Parse a call's text, which may hold several; False where it is none."""
        found = _calls(body, self._marks, self._tools)
        for identity, name, arguments in found:
            out.calls.append(ToolCallDelta(self._calls, identity, name))
            pieces = (arguments[i : i + PIECE] for i in range(0, len(arguments), PIECE))
            out.calls.extend(ToolCallDelta(self._calls, arguments=piece) for piece in pieces)
            self._calls += 1
        self._fresh = bool(found)
        return bool(found)


def _calls(body: str, marks: OutputMarkers, tools: Sequence[Tool]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of the calls in a text; none at all where one of them is broken."""
    assert marks.parse is not None, "tools were offered to a model without a parser"
    try:
        parsed = marks.parse(body, [describe_tool(tool) for tool in tools])
        return [_check_calls(one, tools) for one in (parsed if isinstance(parsed, list) else [parsed])]
    except Exception:  # a parser raises whatever broken text makes it raise; that text is content then
        return []


def _check_calls(call: Any, tools: Sequence[Tool]) -> tuple[str, str, str]:
    """Raises ValueError, KeyError or TypeError for what is no call of one of these tools."""
    name, arguments = call["name"], call.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict) or name not in {tool.name for tool in tools}:
        raise ValueError("no call of a tool that was given")
    identity = call.get("id")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return identity if isinstance(identity, str) and identity else _new_id(), name, text


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _possible_start(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which a mark could begin."""
    longest = min(len(text), max((len(mark) - 1 for mark in marks), default=0))
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
