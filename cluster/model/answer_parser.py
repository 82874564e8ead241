"""Splits the streamed text of an answer into reasoning, content and tool calls.

If the call format allows it, a call's arguments are streamed; the call then counts as a call from their first
character, even if it is cut off later. Otherwise a call is read once it is complete, with mlx-lm's parsers. Their time
grows with the square or the cube of the text, so the parser only asks for that: ``read_calls`` may run elsewhere. If
the text is not a valid call (broken JSON, an unknown tool), it is content. What is lost are markers, the blanks around
them, and a call that is cut off before its name is known.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from cluster.core.limits import MAX_READ_CALLS
from cluster.core.request import Parsing, Tool, ToolCall, ToolCallDelta
from cluster.model.chat_template import describe_tool
from cluster.model.output_markers import OutputMarkers
from cluster.model.partial_tool_call import PartialToolCall

__all__ = ["AnswerParser", "Parsed", "read_calls"]

HEAD_CHARS: Final = 2048
"""Characters before a call's arguments that are searched for its name: it is looked for again with each token."""
PIECE: Final = 64
"""Least number of characters of arguments in one delta of a call that is read as a whole."""
MAX_PIECES: Final = 128
"""Deltas of the arguments of calls that are read together, besides one for each call. Long calls have longer deltas,
since each becomes an event.
"""


@dataclass(frozen=True, slots=True)
class Parsed:
    """The output of one parsing step; clients receive the fields in this order."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class _ParserState(Enum):
    REASONING = 0
    CONTENT = 1
    CALL = 2


@dataclass(slots=True)
class _Out:
    reasoning: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)

    def parsed(self) -> Parsed:
        """Return the collected output."""
        return Parsed("".join(self.reasoning), "".join(self.text), tuple(self.calls))


@dataclass(frozen=True, slots=True)
class _UnreadCalls:
    """The text of complete calls, and the content that it is if they are invalid."""

    body: str
    content: str


class AnswerParser:
    """Parses the text of one answer, piece by piece. The ids of its calls follow from ``identity``; "": random ones."""

    def __init__(self, markers: OutputMarkers, parsing: Parsing, identity: str = "") -> None:
        self._markers = markers
        self._tools = parsing.tools
        self._state = _ParserState.REASONING if parsing.thinking else _ParserState.CONTENT
        self._held = ""
        """Text not yet emitted that is searched for markers."""
        self._kept: list[str] = []
        """Text before that, without markers: blanks that may be dropped, or an unread call. It is not searched again
        with each token.
        """
        self._kept_chars = 0
        self._fresh = parsing.thinking or bool(markers.think_start)
        """Whether the current part is still empty: its leading blanks are dropped."""
        self._blanks = ""
        """Blanks before a call; they are emitted if the call turns out to be content."""
        self._calls = 0
        self._identity = identity or secrets.token_hex(12)
        self._names = frozenset(tool.name for tool in parsing.tools)
        self._open: PartialToolCall | None = None
        """The call whose arguments are being streamed."""
        self._unread: _UnreadCalls | None = None

    @property
    def called(self) -> bool:
        """Return whether a tool call was found; the finish reason is then a tool call."""
        return self._calls > 0

    @property
    def unread_calls(self) -> str | None:
        """The text of complete calls that ``read_calls`` has to read. Nothing is parsed until ``add_calls``."""
        return self._unread.body if self._unread else None

    def add(self, text: str) -> Parsed:
        """Add ``text`` and return the output that is certain now. See ``unread_calls`` afterwards."""
        self._held += text
        return self._advance(_Out())

    def add_calls(self, calls: Sequence[ToolCall]) -> Parsed:
        """Take what ``read_calls`` returned for ``unread_calls``. Return the output that is certain now."""
        unread, self._unread = self._unread, None
        assert unread, "no calls are unread"
        out = _Out()
        if calls:
            self._emit_calls(calls, out)
        else:
            self._fresh = False
            self._emit_text(unread.content, out)
        return self._advance(out)

    def flush(self, *, whole: bool) -> Parsed:
        """Return the rest. ``whole``: the model ended the answer itself, so a call without an end marker is valid.

        Else the answer was cut off, and the beginning of a call is dropped: it is no text for a person. See
        ``unread_calls`` afterwards.
        """
        out = _Out()
        if self._state is _ParserState.CALL:
            body = self._take_kept() + self._held
            self._held = ""
            self._state = _ParserState.CONTENT
            if not self._close_call(body, out) and (whole or not self._markers.call_end):
                content = self._blanks + self._markers.call_start + body
                self._unread = _UnreadCalls(body, content if whole else "")
        else:
            self._emit_text(self._take_kept() + self._held, out, last=True)
            self._held = ""
        return out.parsed()

    def _advance(self, out: _Out) -> Parsed:
        """Process the held text as far as possible, and return all output."""
        while not self._unread and self._step(out):
            pass
        return out.parsed()

    def _step(self, out: _Out) -> bool:
        """Process the held text up to the next marker. Return False if more text is needed."""
        marker, at = self._next_marker()
        if at < 0:
            if self._state is _ParserState.CALL:
                self._emit_certain_arguments(out)
            else:
                self._emit_certain_text(out)
            return False
        before = self._held[:at]
        self._held = self._held[at + len(marker) :]
        self._handle_marker(marker, before, out)
        return True

    def _handle_marker(self, marker: str, before: str, out: _Out) -> None:
        """Process ``marker`` and the text ``before`` it."""
        if self._state is _ParserState.CALL:
            self._state = _ParserState.CONTENT
            before = self._take_kept() + before
            if not self._close_call(before, out):
                content = self._blanks + self._markers.call_start + before + self._markers.call_end
                self._unread = _UnreadCalls(before, content)
            return
        ends_reasoning = self._state is _ParserState.REASONING and marker == self._markers.think_end
        if marker in self._markers.noise and not ends_reasoning:
            self._held = before + self._held
            return
        before = self._take_kept() + before
        emitted = before.rstrip() if self._holds_blanks() else before
        self._emit_text(emitted, out)
        self._blanks = "" if self._fresh else before[len(emitted) :]
        self._state = {
            self._markers.think_start: _ParserState.REASONING,
            self._markers.think_end: _ParserState.CONTENT,
            self._markers.call_start: _ParserState.CALL,
        }[marker]
        self._fresh = self._state is not _ParserState.CALL

    def _markers_here(self) -> tuple[str, ...]:
        m = self._markers
        calls = (m.call_start,) if self._tools and m.call_start else ()
        match self._state:
            case _ParserState.CALL:
                return (m.call_end,) if m.call_end else ()
            case _ParserState.REASONING:
                return (m.think_end, *calls, *m.noise)
            case _ParserState.CONTENT:
                return (*((m.think_start,) if m.think_start else ()), *calls, *m.noise)

    def _next_marker(self) -> tuple[str, int]:
        """Return the first marker (the longest if several start there) and its index; ("", -1) if there is none."""
        found = [(at, -len(marker), marker) for marker in self._markers_here() if (at := self._held.find(marker)) >= 0]
        at, _, marker = min(found, default=(-1, 0, ""))
        return marker, at

    def _emit_certain_text(self, out: _Out) -> None:
        """Emit the held text that cannot belong to a marker. Hold trailing blanks until the next text is known."""
        keep = _possible_start(self._held, self._markers_here())
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        emitted = certain.rstrip() if self._holds_blanks() else certain
        if emitted:
            self._emit_text(self._take_kept() + emitted, out)
        self._keep(certain[len(emitted) :])

    def _holds_blanks(self) -> bool:
        """Return whether blanks before the next marker are dropped, so that they must be held."""
        return self._state is _ParserState.REASONING or bool(self._tools)

    def _emit_text(self, text: str, out: _Out, *, last: bool = False) -> None:
        if self._fresh:
            text = text.lstrip()
        if last and (self._state is _ParserState.REASONING or self.called):
            text = text.rstrip()
        if text:
            self._fresh = False
            (out.reasoning if self._state is _ParserState.REASONING else out.text).append(text)

    def _emit_certain_arguments(self, out: _Out) -> None:
        """Emit the arguments of an unfinished call that are certain."""
        if not self._open and self._kept_chars <= HEAD_CHARS:
            self._held = self._open_call(self._take_kept() + self._held, out)
        at = len(self._held) - _possible_start(self._held, self._markers_here())
        certain, self._held = self._held[:at], self._held[at:]
        if self._open:
            self._emit_arguments(self._open.add(certain), out)
        else:
            self._keep(certain)

    def _keep(self, text: str) -> None:
        if text:
            self._kept.append(text)
            self._kept_chars += len(text)

    def _take_kept(self) -> str:
        kept = "".join(self._kept)
        self._kept, self._kept_chars = [], 0
        return kept

    def _open_call(self, body: str, out: _Out) -> str:
        """Emit the tool's name once it is known. Return the rest of ``body``."""
        if self._open:
            return body
        opened = PartialToolCall.start(body[:HEAD_CHARS], self._markers.format, self._names)
        if opened is None:
            return body
        self._open, at = opened
        out.calls.append(ToolCallDelta(self._calls, self._call_id(), self._open.name))
        self._calls += 1
        return body[at:]

    def _close_call(self, body: str, out: _Out) -> bool:
        """End the streamed call with ``body``. Return False if no call was being streamed."""
        rest = self._open_call(body, out)
        if not self._open:
            return False
        self._emit_arguments(self._open.add(rest), out)
        self._open = None
        self._fresh = True
        return True

    def _emit_arguments(self, arguments: str, out: _Out) -> None:
        if arguments:
            out.calls.append(ToolCallDelta(self._calls - 1, arguments=arguments))

    def _emit_calls(self, calls: Sequence[ToolCall], out: _Out) -> None:
        size = max(PIECE, sum(len(call.arguments) for call in calls) // MAX_PIECES + 1)
        for call in calls:
            out.calls.append(ToolCallDelta(self._calls, call.id or self._call_id(), call.name))
            pieces = (call.arguments[i : i + size] for i in range(0, len(call.arguments), size))
            out.calls.extend(ToolCallDelta(self._calls, arguments=piece) for piece in pieces)
            self._calls += 1
        self._fresh = True

    def _call_id(self) -> str:
        """Return the id of the next call."""
        key = f"{self._identity}/{self._calls}"
        return f"call_{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"


def read_calls(body: str, markers: OutputMarkers, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
    """Return the calls in ``body``; none if any of them is invalid, or if they are too many.

    A call has the id that the model gave it, or "".

    Unbounded in time and memory: the parsers of some formats need hours for 64 KiB.
    """
    assert markers.parse is not None, "tools were offered to a model without a parser"
    try:
        parsed = markers.parse(body, [describe_tool(tool) for tool in tools])
        calls = parsed if isinstance(parsed, list) else [parsed]
        return tuple(_check_call(one, tools) for one in calls) if len(calls) <= MAX_READ_CALLS else ()
    except Exception:  # parsers may raise anything for invalid text; such text is content
        return ()


def _check_call(call: Any, tools: Sequence[Tool]) -> ToolCall:
    """Return a parsed call. Raises ValueError, KeyError or TypeError if it is no call of ``tools``."""
    name, arguments = call["name"], call.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or name not in {tool.name for tool in tools}:
        raise ValueError("not a call of an offered tool")
    identity = call.get("id")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(identity if isinstance(identity, str) else "", name, text)


def _possible_start(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of a marker."""
    longest = min(len(text), max((len(marker) - 1 for marker in markers), default=0))
    return next((n for n in range(longest, 0, -1) if any(marker.startswith(text[-n:]) for marker in markers)), 0)
