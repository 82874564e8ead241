"""Splits the text of an answer's events into reasoning, tool calls and content.

It runs where the events are read, not on the engine loop's thread: to read calls that are longer than a few lines it
waits for the sandbox, since the parsers of some formats need hours for some texts. Meanwhile only this answer waits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from cluster.coordinator.model_reader import ModelInfo
from cluster.core.limits import SMALL_CALL_CHARS, SMALL_TOOLS_CHARS
from cluster.core.request import Accepted, FinishEvent, FinishReason, Request, SkippedText, TokenEvent, ToolCall
from cluster.model.answer_parser import AnswerParser, Parsed

AnswerEvent: TypeAlias = Accepted | TokenEvent | FinishEvent


class ParsedAnswers:
    """The parsers of one request's answers; they do nothing if the request leaves its answers as they are."""

    def __init__(self, request: Request, model_info: ModelInfo) -> None:
        self._model_info = model_info
        self._parsers: list[AnswerParser] = []
        if request.parsing is None:
            return
        self._tools = request.parsing.tools
        self._small_tools = sum(len(tool.parameters) for tool in self._tools) <= SMALL_TOOLS_CHARS
        identity = f"{request.id}/{request.sampling.seed}"  # a resumed answer has the same calls
        self._parsers = [
            model_info.tokenizer.parser(request.parsing, f"{identity}/{sample}") for sample in range(request.samples)
        ]

    async def skip(self, skipped: SkippedText) -> None:
        """Parse text that the reader already has."""
        parser = self._parsers[skipped.sample]
        await self._read_calls(parser, parser.add(skipped.text))

    async def parse(self, event: AnswerEvent) -> AnswerEvent:
        """Return ``event`` with its text split. Raises ``Busy`` or ``NotServing`` if calls in it cannot be read."""
        if isinstance(event, Accepted) or not self._parsers:
            return event
        parser = self._parsers[event.sample]
        parsed = await self._read_calls(parser, parser.add(event.text))
        if isinstance(event, FinishEvent):
            whole = event.reason is FinishReason.STOP and not event.stop
            rest = await self._read_calls(parser, parser.flush(whole=whole))
            parsed = _join(parsed, rest)
            if parser.called and event.reason is FinishReason.STOP:
                event = replace(event, reason=FinishReason.TOOL_CALLS)
        return replace(event, text=parsed.text, reasoning=parsed.reasoning, calls=parsed.calls)

    async def _read_calls(self, parser: AnswerParser, parsed: Parsed) -> Parsed:
        """Return ``parsed`` with the output of the calls that ``parser`` has found since."""
        while (body := parser.unread_calls) is not None:
            parsed = _join(parsed, parser.add_calls(await self._calls(body)))
        return parsed

    async def _calls(self, body: str) -> tuple[ToolCall, ...]:
        if self._small_tools and len(body) <= SMALL_CALL_CHARS:
            return self._model_info.tokenizer.read_calls(body, self._tools)
        return await self._model_info.text.read_calls(body, self._tools)


def _join(first: Parsed, second: Parsed) -> Parsed:
    return Parsed(first.reasoning + second.reasoning, first.text + second.text, first.calls + second.calls)
