"""POST /v1/responses: the route's handler, and the output items of a response that is not streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from cluster.api.http.answer_assembly import AnswerPart, CollectedAnswer, collect_answers
from cluster.api.http.body import charge_of, read
from cluster.api.http.chat_submission import chat_submission
from cluster.api.http.json_response import LongJson, encode_text, encoded_list, new_id
from cluster.api.http.logprobs import chat_row
from cluster.api.http.model_names import ModelNames
from cluster.api.http.passed_answer import answer_id, answer_time
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.http.responses_object import NO_LOGPROBS, ResponseEncoder
from cluster.api.http.responses_stream import ResponseStreamEncoder
from cluster.api.http.sse import EventStream, while_connected
from cluster.api.request_service import RequestService, RunningRequest
from cluster.core.request import FinishEvent, TokenEvent
from cluster.transport.byte_budget import Charge


@dataclass(frozen=True, slots=True)
class Responses:
    """The route's handler."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> LongJson | EventStream[TokenEvent | FinishEvent]:
        form = await read(request, ResponsesForm)
        encoder = ResponseEncoder(
            form, answer_id(request, "resp_"), self.names.requested_name(form.model), int(answer_time(request))
        )
        submission = chat_submission(self.service, self.names, request, form, encoder.id)
        charge = charge_of(request)
        if form.stream:
            return await submission.stream(ResponseStreamEncoder(encoder, charge))
        running, model = await submission.submit()
        encoder = replace(encoder, model=model)
        return LongJson(await while_connected(request, lambda: _whole_response(encoder, running, charge)))


async def _whole_response(encoder: ResponseEncoder, running: RunningRequest, charge: Charge) -> dict[str, Any]:
    (answer,) = await collect_answers(running, charge, chat_row if encoder.form.logprobs else None)
    assert answer.finish
    items = await encode_items(encoder, answer)
    return encoder.finish_object(items, answer.finish, answer.reasoning_counter.tokens)


async def encode_items(encoder: ResponseEncoder, answer: CollectedAnswer) -> Sequence[dict[str, Any]]:
    """Return the output items in the order of generation. An empty answer has one empty message."""
    tokens = encoded_list(row for (row,) in answer.rows)
    items = []
    for part in answer.parts or (AnswerPart(),):
        if part.call:
            items.append(
                encoder.call(new_id("fc_"), part.call.id, part.call.name, await encode_text(part.call.arguments))
            )
        elif part.reasoning:
            items.append(encoder.reasoning(new_id("rs_"), await encode_text(part.text)))
        else:
            items.append(encoder.message(new_id("msg_"), await encode_text(part.text), tokens))
            tokens = NO_LOGPROBS  # the first message has them all; another message follows only after a call
    if answer.finish:
        items[-1]["status"] = encoder.item_status(answer.finish)
    return items
