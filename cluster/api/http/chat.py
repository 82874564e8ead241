"""POST /v1/chat/completions: one or several samples, as one response or as a stream of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from cluster.api.http.answer_assembly import (
    CollectedAnswer,
    EncodeRow,
    collect_answers,
    is_content,
    openai_usage,
    reasoning_counters,
    sum_usage,
)
from cluster.api.http.body import charge_of, read
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.chat_submission import chat_submission
from cluster.api.http.errors import openai_error
from cluster.api.http.json_response import LongJson, encode_text, encoded_list
from cluster.api.http.logprobs import chat_logprobs, chat_row
from cluster.api.http.model_names import ModelNames
from cluster.api.http.passed_answer import answer_id, answer_time
from cluster.api.http.reasoning_counter import ReasoningCounter
from cluster.api.http.sse import COMMENT, DONE, EventStream, event, while_connected
from cluster.api.request_service import RequestService, RunningRequest
from cluster.core.errors import MacpipeError
from cluster.core.request import FinishEvent, TokenEvent, ToolCallDelta
from cluster.transport.byte_budget import Charge


@dataclass(frozen=True, slots=True)
class Chat:
    """The route's handler."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> LongJson | EventStream[TokenEvent | FinishEvent]:
        form = await read(request, ChatForm)
        head = ChunkHead(
            answer_id(request, "chatcmpl-"), int(answer_time(request)), self.names.requested_name(form.model)
        )
        submission = chat_submission(self.service, self.names, request, form, head.id)
        if form.stream:
            usage = bool(form.stream_options and form.stream_options.include_usage)
            return await submission.stream(ChatEncoder(head, form.samples, bool(form.logprobs), usage))
        running, model = await submission.submit()
        head = replace(head, model=model)
        charge, rows = charge_of(request), chat_row if form.logprobs else None
        return LongJson(await while_connected(request, lambda: _completion(head, running, charge, rows)))


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """The fields that all chunks of one answer share."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def _completion(
    head: ChunkHead, running: RunningRequest, charge: Charge, rows: EncodeRow | None
) -> dict[str, Any]:
    answers = await collect_answers(running, charge, rows)
    usage = openai_usage(sum_usage(w.finish for w in answers), sum(w.reasoning_counter.tokens for w in answers))
    choices = [await _choice(i, answer, logprobs=rows is not None) for i, answer in enumerate(answers)]
    return {**head.fields("chat.completion"), "choices": choices, "usage": usage}


async def _choice(index: int, answer: CollectedAnswer, *, logprobs: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": await encode_text(answer.text)}
    if answer.calls and not answer.text:
        message["content"] = None
    message["refusal"] = None
    if answer.reasoning:
        reasoning = await encode_text(answer.reasoning)
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if answer.calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": await encode_text(c.arguments)}}
            for c in answer.calls
        ]
    entries = encoded_list(row for (row,) in answer.rows)
    shown = {"content": entries, "refusal": None} if logprobs else None
    reason = answer.finish.reason.value if answer.finish else None
    return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}


@dataclass(slots=True)
class ChatEncoder:
    """A streamed answer: first the role, then a delta per token, the finish reason, usage if requested, and [DONE]."""

    head: ChunkHead
    samples: int
    logprobs: bool
    usage: bool
    _running: RunningRequest | None = None
    _finishes: list[FinishEvent] = field(default_factory=list)
    _counters: list[ReasoningCounter] = field(init=False)

    def attach(self, running: RunningRequest, model: str) -> None:
        self._running = running
        self.head = replace(self.head, model=model)
        self._counters = reasoning_counters(running)

    def begin(self) -> Iterator[bytes]:
        for i in range(self.samples):
            yield self._chunk(i, {"role": "assistant", "content": ""})

    def encode(self, e: TokenEvent | FinishEvent) -> list[bytes]:
        if isinstance(e, FinishEvent):
            self._finishes.append(e)
        self._counters[e.sample].add(e)
        return self._pieces(e)

    def end(self) -> Iterator[bytes]:
        if self.usage:
            finishes = sorted(self._finishes, key=lambda finish: finish.sample)
            usage = openai_usage(sum_usage(finishes), sum(c.tokens for c in self._counters))
            yield event({**self.head.fields("chat.completion.chunk"), "choices": [], "usage": usage})
        yield DONE

    def idle(self) -> bytes:
        """Return a comment. While the model is loaded, return a chunk that adds nothing: some clients count these."""
        return COMMENT if self._running else self._chunk(0, {})

    def fail(self, error: MacpipeError) -> bytes:
        return event(openai_error(error))

    def _pieces(self, e: TokenEvent | FinishEvent) -> list[bytes]:
        """Return the chunks of one event: usually one, one more per tool call delta, none if nothing is visible."""
        delta: dict[str, Any] = {}
        if e.reasoning:
            delta |= {"reasoning_content": e.reasoning, "reasoning": e.reasoning}
        if e.text:
            delta["content"] = e.text
        shown = isinstance(e, TokenEvent) and self.logprobs and is_content(e)
        pieces = []
        if delta or shown:
            assert self._running
            logprobs = chat_logprobs([e], self._running) if shown else None  # type: ignore[list-item]  # shown: a token
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
        chunk = {**self.head.fields("chat.completion.chunk"), "choices": [choice]}
        return event({**chunk, "usage": None} if self.usage else chunk)


def _call(delta: ToolCallDelta) -> dict[str, Any]:
    """Encode a tool call delta. The first delta of a call has id, type and name; all have the index."""
    function: dict[str, Any] = {"arguments": delta.arguments}
    if not delta.id and not delta.name:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}
