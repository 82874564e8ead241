"""POST /v1/messages: Anthropic's shape, whole or as its named events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request

from cluster.api import intake
from cluster.api.desk import Asked, Desk
from cluster.api.http.answers import Part, fields_named, gathered, grammar_fields
from cluster.api.http.body import build, read
from cluster.api.http.caller import caller_of
from cluster.api.http.errors import anthropic_error, sentence_of
from cluster.api.http.identity import new_id
from cluster.api.http.jsons import Json
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.names import Names
from cluster.api.http.sse import EventStream, event, while_connected
from cluster.types import FinishEvent, FinishReason, TokenEvent, Usage

FIELDS: Final = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "enable_thinking": "thinking",
    "reasoning_effort": "output_config.effort",
    "tools[]": ".input_schema",
}
PING: Final = event({"type": "ping"}, "ping")


@dataclass(frozen=True, slots=True)
class Messages:
    """The route."""

    desk: Desk
    names: Names

    async def __call__(self, request: Request) -> Json | EventStream:
        form = await read(request, MessagesForm)
        checkpoint = self.names.checkpoint(form.model)
        request_id = new_id("msg_")
        formatted = form.output_config is not None and form.output_config.format is not None
        with fields_named({**FIELDS, **grammar_fields("output_config.format" if formatted else "tools")}):
            message = await build(request, lambda: form.message(request_id))
            taken = await intake.chat_request(message, checkpoint, caller_of(request, None))
            asked = await self.desk.ask(taken, checkpoint)
        model = self.names.shown(form.model, checkpoint)
        if form.stream:
            return EventStream(Stream(model, asked).events(), PING)
        return Json(await while_connected(request, lambda: _whole(model, asked)))


def message_of(model: str, asked: Asked, usage: Usage) -> dict[str, Any]:
    """The message before anything is in it."""
    return {
        "id": asked.request.id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage_of(usage),
    }


def usage_of(usage: Usage) -> dict[str, int]:
    """Anthropic counts what was read from the cache apart from the rest of the input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def ending(finish: FinishEvent) -> dict[str, Any]:
    """Why it stopped, and at which of the stop sequences."""
    if finish.reason is FinishReason.TOOL_CALLS:
        reason = "tool_use"
    elif finish.reason is FinishReason.LENGTH:
        reason = "max_tokens"
    else:
        reason = "stop_sequence" if finish.stop else "end_turn"
    return {"stop_reason": reason, "stop_sequence": finish.stop or None}


async def _whole(model: str, asked: Asked) -> dict[str, Any]:
    (whole,) = await gathered(asked)
    assert whole.finish
    content = [_block(part) for part in whole.parts]
    return {**message_of(model, asked, whole.finish.usage), "content": content, **ending(whole.finish)}


def _block(part: Part) -> dict[str, Any]:
    if part.call:
        return {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": _object(part.call.arguments)}
    if part.reasoning:
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}


def _object(text: str) -> dict[str, Any]:
    """A call's arguments. A model that was free to write what it likes, and stopped midway, may have written none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(slots=True)
class Stream:
    """A streamed message: blocks open, grow and close one after the other."""

    model: str
    asked: Asked
    _open: str = ""
    """What the open block is: text, thinking, or a call by its number; empty before the first."""
    _index: int = field(default=-1)
    _begun: bool = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events. An error that ends the answer is the last of them."""
        try:
            async with aclosing(self.asked.events) as events:
                async for e in events:
                    if not self._begun:
                        self._begun = True
                        yield self._start(e)
                    for piece in self._grown(e):
                        yield piece
                    if isinstance(e, FinishEvent):
                        yield self._closed()
                        yield _named({"type": "message_delta", "delta": ending(e), "usage": usage_of(e.usage)})
                        yield _named({"type": "message_stop"})
        except Exception as error:  # headers are out: the stream is the only place left to say it
            yield event(anthropic_error(sentence_of(error, self.asked.request.id)), "error")

    def _start(self, first: TokenEvent | FinishEvent) -> bytes:
        """What of the prompt was kept is known with the first event, and clients believe what the start says."""
        cached = first.usage.cached_tokens if isinstance(first, FinishEvent) else first.cached_tokens
        usage = Usage(len(self.asked.request.prompt), 0, cached)
        return _named({"type": "message_start", "message": message_of(self.model, self.asked, usage)})

    def _grown(self, e: TokenEvent | FinishEvent) -> Iterator[bytes]:
        if e.reasoning:
            yield self._opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": e.reasoning})
        if e.text:
            yield self._opened("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": e.text})
        for call in e.calls:
            start = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            yield self._opened(f"call {call.index}", start)
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _opened(self, kind: str, block: dict[str, Any]) -> bytes:
        """The events that make this the open block; none where it is."""
        if kind == self._open:
            return b""
        closed = self._closed()
        self._open, self._index = kind, self._index + 1
        return closed + _named({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _named({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _closed(self) -> bytes:
        """The event that closes the open block, if one is."""
        if not self._open:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        self._open = ""
        return signed + _named({"type": "content_block_stop", "index": self._index})


def _named(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])
