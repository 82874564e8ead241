"""Ollama's POST /api/chat and /api/generate: an answer as one object, or as a stream of JSON lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request

from cluster.api.http.adjustments import adjustments_of
from cluster.api.http.answer_assembly import (
    EncodeRow,
    GeneratedCall,
    charge_answer,
    collect_answers,
    held_size,
    is_content,
)
from cluster.api.http.answer_submission import AnswerSubmission
from cluster.api.http.body import build, charge_of, read
from cluster.api.http.call_arguments import encode_arguments
from cluster.api.http.chat_submission import submit_params
from cluster.api.http.errors import ollama_error
from cluster.api.http.json_response import LongJson, encode_text, encoded_list
from cluster.api.http.logprobs import chat_row, entry
from cluster.api.http.model_names import ModelNames
from cluster.api.http.ollama_form import OllamaChatForm, OllamaGenerateForm
from cluster.api.http.ollama_models import known_name
from cluster.api.http.passed_answer import answer_id, passed_answer
from cluster.api.http.sse import JSON_LINES, EventStream, json_line, while_connected
from cluster.api.request_service import RequestService, RunningRequest
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.core.request import FinishEvent, FinishReason, TokenEvent, ToolCallDelta
from cluster.transport.byte_budget import Charge
from cluster.transport.parsing_thread import PARSING

NS_PER_MS: Final = 1_000_000
WHOLE_CALLS: Final = "use /v1/chat/completions, which sends them as text"
"""What to do where Ollama's API cannot send the arguments of a call."""


@dataclass(frozen=True, slots=True)
class Ollama:
    """The handlers of both routes."""

    service: RequestService
    names: ModelNames

    async def chat(self, request: Request) -> LongJson | EventStream[TokenEvent | FinishEvent]:
        """Answer a conversation."""
        return await self._answer(request, await read(request, OllamaChatForm), chats=True)

    async def generate(self, request: Request) -> LongJson | EventStream[TokenEvent | FinishEvent]:
        """Answer or continue a prompt."""
        return await self._answer(request, await read(request, OllamaGenerateForm), chats=False)

    async def _answer(
        self, request: Request, form: OllamaChatForm | OllamaGenerateForm, *, chats: bool
    ) -> LongJson | EventStream[TokenEvent | FinishEvent]:
        began = time.monotonic_ns()
        if form.unloads and not form.asks:
            raise InvalidRequest(
                "clients cannot unload a model, since others may use it; run `macpipe unload` on a Mac of the cluster",
                field="keep_alive",
            )
        requested, request_id = known_name(self.names, form.model), answer_id(request, "ollama-")
        passed = passed_answer(request)
        head = AnswerHead(
            self.names.requested_name(requested), chats, began, created=passed.created if passed else None
        )
        if not form.asks:
            await while_connected(request, lambda: self._load(requested))
            return LongJson({**head.fields(), **head.text(""), "done": True, "done_reason": "load"})
        submission = AnswerSubmission(
            self.names,
            request,
            requested,
            request_id,
            check=lambda: form.params(request_id),
            submit_to=lambda model_info: self._submit(request, form, request_id, model_info),
            events_of=lambda running: aclosing(running.events),
        )
        charge = charge_of(request)
        if form.is_streamed:
            return await submission.stream(OllamaEncoder(head, charge, bool(form.logprobs)), JSON_LINES)
        running, model = await submission.submit()
        head, rows = head.attach(model), chat_row if form.logprobs else None
        return LongJson(await while_connected(request, lambda: _whole_answer(head, running, charge, rows)))

    async def _load(self, requested: str) -> None:
        async with self.names.hold(requested, self.names.load_wait_s):
            return

    async def _submit(
        self, request: Request, form: OllamaChatForm | OllamaGenerateForm, request_id: str, model_info: ModelInfo
    ) -> RunningRequest:
        if form.options and form.options.num_ctx and form.options.num_ctx > model_info.shape.max_context:
            adjustments_of(request.scope).ignore(("options.num_ctx",))
        params = await build(request, lambda: form.params(request_id))
        return await submit_params(self.service, request, params, form.field_names(), model_info)


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all objects of one answer share. ``chats``: the text is in a message. Times are in nanoseconds.

    ``began`` is when the request was read, by the monotonic clock, and ``load_ns`` how long it then waited for its
    model and its tokens.
    """

    model: str
    chats: bool
    began: int
    load_ns: int = 0
    created: float | None = None
    """Time of all objects, in seconds since 1970; None: each has its own."""

    def attach(self, model: str) -> AnswerHead:
        """Return the head of an answer that has begun, of the model with this name."""
        return replace(self, model=model, load_ns=time.monotonic_ns() - self.began)

    def fields(self) -> dict[str, Any]:
        """Return the first fields of an object."""
        return {"model": self.model, "created_at": _format_time(self.created)}

    def text(self, text: Any, thinking: Any = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the fields that hold a part of the answer."""
        more = {**({"thinking": thinking} if thinking else {}), **({"tool_calls": calls} if calls else {})}
        if self.chats:
            return {"message": {"role": "assistant", "content": text, **more}}
        return {"response": text, **more}

    def ending(self, finish: FinishEvent) -> dict[str, Any]:
        """Return the reason why an answer ended, its counts and its times, none of which is zero: clients divide."""
        usage = finish.usage
        decode_ms = finish.tpot_ms * max(usage.completion_tokens - 1, 0)
        return {
            "done": True,
            "done_reason": "length" if finish.reason is FinishReason.LENGTH else "stop",
            "total_duration": time.monotonic_ns() - self.began,
            "load_duration": self.load_ns,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": max(1, round(finish.ttft_ms * NS_PER_MS)),
            "eval_count": usage.completion_tokens,
            "eval_duration": max(1, round(decode_ms * NS_PER_MS)),
        }


def _format_time(at: float | None) -> str:
    """Return a time in seconds since 1970, or now, as Ollama writes it."""
    moment = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def _whole_answer(
    head: AnswerHead, running: RunningRequest, charge: Charge, rows: EncodeRow | None
) -> dict[str, Any]:
    (answer,) = await collect_answers(running, charge, rows)
    assert answer.finish
    text, thinking = await encode_text(answer.text), await encode_text(answer.reasoning)
    calls = [await _whole_call(i, call) for i, call in enumerate(answer.calls)]
    logprobs = {"logprobs": encoded_list(row for (row,) in answer.rows)} if rows else {}
    return {**head.fields(), **head.text(text, thinking, calls), **logprobs, **head.ending(answer.finish)}


async def _whole_call(index: int, call: GeneratedCall) -> dict[str, Any]:
    arguments = await PARSING.run(len(call.arguments), encode_arguments, call.arguments, WHOLE_CALLS)
    return _encode_call(index, call, arguments)


def _encode_call(index: int, call: GeneratedCall, arguments: object) -> dict[str, Any]:
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}}


@dataclass(slots=True)
class OllamaEncoder:
    """A streamed answer: a line per token, one per complete call, and one with the counts."""

    head: AnswerHead
    charge: Charge
    """What the request holds until it ends: the arguments of a call are held until the call is complete."""
    logprobs: bool
    _running: RunningRequest = field(init=False)
    _call: GeneratedCall | None = None
    _calls: int = field(default=0)

    def attach(self, running: RunningRequest, model: str) -> None:
        self._running = running
        self.head = self.head.attach(model)

    def begin(self) -> Iterator[bytes]:
        yield from ()  # Ollama's first line has text

    def encode(self, e: TokenEvent | FinishEvent) -> Iterator[bytes]:
        shown = [entry(e, self._running)] if isinstance(e, TokenEvent) and self.logprobs and is_content(e) else []
        if e.text or e.reasoning or shown:
            yield self._line(self.head.text(e.text, e.reasoning), {"logprobs": shown} if shown else {})
        for delta in e.calls:
            yield self._add_call(delta)
        if isinstance(e, FinishEvent):
            yield self._end_call()
            yield json_line({**self.head.fields(), **self.head.text(""), **self.head.ending(e)})

    def end(self) -> Iterator[bytes]:
        yield from ()  # the finish event was the end

    def idle(self) -> bytes:
        return self._line(self.head.text(""))

    def fail(self, error: MacpipeError) -> bytes:
        return json_line(ollama_error(error))

    def _add_call(self, delta: ToolCallDelta) -> bytes:
        """Add to the open call. Return the one before it if a new one begins, which its name tells."""
        ended = b""
        if self._call is None or delta.name:
            ended = self._end_call()
            self._call = GeneratedCall(delta.id, delta.name)
        charge_answer(self.charge, held_size(delta.arguments))
        self._call.arguments += delta.arguments
        return ended

    def _end_call(self) -> bytes:
        """Return the call that is complete; empty if there is none."""
        call, self._call = self._call, None
        if call is None:
            return b""
        self._calls += 1
        arguments = encode_arguments(call.arguments, WHOLE_CALLS)
        return self._line(self.head.text("", "", [_encode_call(self._calls - 1, call, arguments)]))

    def _line(self, part: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        return json_line({**self.head.fields(), **part, **(more or {}), "done": False})
