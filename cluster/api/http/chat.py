"""POST /v1/chat/completions: one answer or several, whole or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from cluster.api import request_validation
from cluster.api.http.answer_assembly import (
    WholeAnswer,
    fields_named,
    gather_answers,
    grammar_fields,
    is_content,
    openai_usage,
    reasoned,
    total,
)
from cluster.api.http.body import build, read
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.errors import openai_error, sentence_of
from cluster.api.http.json_response import Json, new_id
from cluster.api.http.logprobs import chat_logprobs
from cluster.api.http.model_names import ModelNames
from cluster.api.http.reasoning_effort import thinking_fields
from cluster.api.http.sse import DONE, EventStream, event, while_connected
from cluster.api.request_service import RequestService, RunningRequest
from cluster.core.request import FinishEvent, TokenEvent, ToolCallDelta

SCHEMA: Final = ".function.parameters"


@dataclass(frozen=True, slots=True)
class Chat:
    """The route."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> Json | EventStream:
        form = await read(request, ChatForm)
        checkpoint = self.names.checkpoint(form.model)
        head = ChunkHead(new_id("chatcmpl-"), int(time.time()), self.names.shown_name(form.model, checkpoint))
        with fields_named(_fields(form)):
            message = await build(request, lambda: form.message(head.id))
            taken = await request_validation.chat_request(message, checkpoint, caller_of(request, None))
            running = await self.service.ask(taken, checkpoint)
        if form.stream:
            usage = bool(form.stream_options and form.stream_options.include_usage)
            return EventStream(Chunks(head, running, bool(form.logprobs), usage).events())
        return Json(await while_connected(request, lambda: _completion(head, running, bool(form.logprobs))))


def _fields(form: ChatForm) -> dict[str, str]:
    """What the intake's fields are called here. Where no format was asked for, the grammar is that of the tools."""
    length = "max_tokens" if form.max_tokens else "max_completion_tokens"
    bound = grammar_fields("response_format" if form.response_format else "tools")
    thinking = thinking_fields(form.chat_template_kwargs, "reasoning_effort")
    return {"prompt": "messages", "max_tokens": length, "samples": "n", "tools[]": SCHEMA, **thinking, **bound}


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """What every chunk of one answer says alike."""

    id: str
    created: int
    model: str

    def of(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def _completion(head: ChunkHead, running: RunningRequest, logprobs: bool) -> dict[str, Any]:
    wholes = await gather_answers(running)
    usage = openai_usage(total(w.finish for w in wholes), sum(w.reasoned.tokens for w in wholes))
    choices = [_choice(i, whole, running, logprobs) for i, whole in enumerate(wholes)]
    return {**head.of("chat.completion"), "choices": choices, "usage": usage}


def _choice(index: int, whole: WholeAnswer, running: RunningRequest, logprobs: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": whole.text or (None if whole.calls else "")}
    message["refusal"] = None
    if whole.reasoning:
        message |= {"reasoning_content": whole.reasoning, "reasoning": whole.reasoning}
    if whole.calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in whole.calls
        ]
    shown = chat_logprobs(whole.tokens, running) if logprobs else None
    reason = whole.finish.reason.value if whole.finish else None
    return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}


@dataclass(frozen=True, slots=True)
class Chunks:
    """A streamed answer: the role first, then what each token brought, then the reason, usage where asked, [DONE]."""

    head: ChunkHead
    running: RunningRequest
    logprobs: bool
    usage: bool

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events. An error that ends the answer is the last of them."""
        finishes: list[FinishEvent] = []
        counts = reasoned(self.running)
        try:
            async with aclosing(self.running.events) as events:
                for i in range(self.running.request.samples):
                    yield self._chunk(i, {"role": "assistant", "content": ""})
                async for e in events:
                    if isinstance(e, FinishEvent):
                        finishes.append(e)
                    counts[e.sample].add(e)
                    for piece in self._pieces(e):
                        yield piece
        except Exception as error:  # headers are out: the stream is the only place left to say it
            yield event(openai_error(sentence_of(error, self.head.id)))
            return
        if self.usage:
            finishes.sort(key=lambda finish: finish.sample)
            usage = openai_usage(total(finishes), sum(c.tokens for c in counts))
            yield event({**self.head.of("chat.completion.chunk"), "choices": [], "usage": usage})
        yield DONE

    def _pieces(self, e: TokenEvent | FinishEvent) -> list[bytes]:
        """The chunks of one event, most often one: each piece of a call has its own. Nothing to show makes none."""
        delta: dict[str, Any] = {}
        if e.reasoning:
            delta |= {"reasoning_content": e.reasoning, "reasoning": e.reasoning}
        if e.text:
            delta["content"] = e.text
        shown = isinstance(e, TokenEvent) and self.logprobs and is_content(e)
        pieces = []
        if delta or shown:
            logprobs = chat_logprobs([e], self.running) if shown else None  # type: ignore[list-item]  # shown: a token
            pieces.append(self._chunk(e.sample, delta, logprobs))
        pieces += [self._chunk(e.sample, {"tool_calls": [_call(c)]}) for c in e.calls]
        if isinstance(e, FinishEvent):
            pieces.append(self._chunk(e.sample, {}, None, e.reason.value))
        return pieces

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
        if self.logprobs:
            choice["logprobs"] = logprobs
        chunk = {**self.head.of("chat.completion.chunk"), "choices": [choice]}
        return event({**chunk, "usage": None} if self.usage else chunk)


def _call(delta: ToolCallDelta) -> dict[str, Any]:
    """A call's first piece has id, type and name; all have the index."""
    function: dict[str, Any] = {"arguments": delta.arguments}
    if not delta.id and not delta.name:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}
