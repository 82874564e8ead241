"""POST /v1/messages: an answer in Anthropic's format, as one response or as a stream of named events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request

from cluster.api.http.answer_assembly import AnswerPart, collect_answers
from cluster.api.http.body import charge_of, read
from cluster.api.http.call_arguments import encode_arguments
from cluster.api.http.chat_submission import chat_submission
from cluster.api.http.errors import anthropic_error
from cluster.api.http.json_response import LongJson, encode_text
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.model_names import ModelNames
from cluster.api.http.passed_answer import answer_id
from cluster.api.http.sse import EventStream, event, while_connected
from cluster.api.request_service import RequestService, RunningRequest
from cluster.core.errors import MacpipeError
from cluster.core.request import FinishEvent, FinishReason, TokenEvent, Usage
from cluster.transport.byte_budget import Charge
from cluster.transport.parsing_thread import PARSING

PING: Final = event({"type": "ping"}, "ping")


@dataclass(frozen=True, slots=True)
class Messages:
    """The route's handler."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> LongJson | EventStream[TokenEvent | FinishEvent]:
        form = await read(request, MessagesForm)
        submission = chat_submission(self.service, self.names, request, form, answer_id(request, "msg_"))
        if form.stream:
            return await submission.stream(MessageEncoder())
        running, model = await submission.submit()
        charge = charge_of(request)
        return LongJson(await while_connected(request, lambda: _whole_response(model, running, charge)))


def encode_message(model: str, running: RunningRequest, usage: Usage) -> dict[str, Any]:
    """Return a message without content."""
    return {
        "id": running.request.id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": encode_usage(usage),
    }


def encode_usage(usage: Usage) -> dict[str, int]:
    """Return Anthropic's usage object, which counts cached prompt tokens separately from the other input tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def encode_ending(finish: FinishEvent) -> dict[str, Any]:
    """Return the stop reason, and the stop sequence that was found."""
    if finish.reason is FinishReason.TOOL_CALLS:
        reason = "tool_use"
    elif finish.reason is FinishReason.LENGTH:
        reason = "max_tokens"
    else:
        reason = "stop_sequence" if finish.stop else "end_turn"
    return {"stop_reason": reason, "stop_sequence": finish.stop or None}


async def _whole_response(model: str, running: RunningRequest, charge: Charge) -> dict[str, Any]:
    (answer,) = await collect_answers(running, charge)
    assert answer.finish
    content = [await encode_block(part) for part in answer.parts]
    return {**encode_message(model, running, answer.finish.usage), "content": content, **encode_ending(answer.finish)}


async def encode_block(part: AnswerPart) -> dict[str, Any]:
    """Return a block of a message's content. Raises ``InvalidRequest`` as ``encode_arguments``."""
    if part.call:
        arguments = part.call.arguments
        known = await PARSING.run(len(arguments), encode_arguments, arguments)
        return {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": known}
    if part.reasoning:
        return {"type": "thinking", "thinking": await encode_text(part.text), "signature": ""}
    return {"type": "text", "text": await encode_text(part.text)}


@dataclass(slots=True)
class MessageEncoder:
    """A streamed message. Its blocks are opened, extended and closed one after the other."""

    _model: str = ""
    _running: RunningRequest | None = None
    _open: str = ""
    """The kind of the open block: ``text``, ``thinking``, or ``call`` with its number; empty if none is open."""
    _index: int = field(default=-1)
    _started: bool = False

    def attach(self, running: RunningRequest, model: str) -> None:
        self._running, self._model = running, model

    def begin(self) -> Iterator[bytes]:
        """Yield nothing, since the first event tells what the start says; while the model is loaded, a ping."""
        if self._running is None:
            yield PING

    def encode(self, e: TokenEvent | FinishEvent) -> Iterator[bytes]:
        if not self._started:
            self._started = True
            yield self._start(e)
        yield from self._extend(e)
        if isinstance(e, FinishEvent):
            yield self._close_block()
            usage = encode_usage(e.usage)
            yield _named_event({"type": "message_delta", "delta": encode_ending(e), "usage": usage})
            yield _named_event({"type": "message_stop"})

    def end(self) -> Iterator[bytes]:
        yield from ()  # the finish event was the end

    def idle(self) -> bytes:
        return PING

    def fail(self, error: MacpipeError) -> bytes:
        return event(anthropic_error(error), "error")

    def _start(self, first: TokenEvent | FinishEvent) -> bytes:
        """Return ``message_start``. It waits for the first event, which knows the number of cached tokens."""
        cached = first.usage.cached_tokens if isinstance(first, FinishEvent) else first.cached_tokens
        assert self._running
        usage = Usage(len(self._running.request.prompt), 0, cached)
        return _named_event({"type": "message_start", "message": encode_message(self._model, self._running, usage)})

    def _extend(self, e: TokenEvent | FinishEvent) -> Iterator[bytes]:
        """Yield the events that add one token's output to the blocks."""
        if e.reasoning:
            yield self._open_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": e.reasoning})
        if e.text:
            yield self._open_block("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": e.text})
        for call in e.calls:
            start = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            yield self._open_block(f"call {call.index}", start)
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _open_block(self, kind: str, block: dict[str, Any]) -> bytes:
        """Return the events that open this block and close the previous one; empty if it is already open."""
        if kind == self._open:
            return b""
        closed = self._close_block()
        self._open = kind
        self._index += 1
        return closed + _named_event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _named_event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close_block(self) -> bytes:
        """Return the events that close the open block; empty if none is open."""
        if not self._open:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        self._open = ""
        return signed + _named_event({"type": "content_block_stop", "index": self._index})


def _named_event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])
