"""POST /v1/responses: the route's handler, and the output items of a response that is not streamed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from cluster.api import request_validation
from cluster.api.http.answer_assembly import AnswerPart, WholeAnswer, fields_named, gather_answers, grammar_fields
from cluster.api.http.body import build, read
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.json_response import Json, new_id
from cluster.api.http.logprobs import entry
from cluster.api.http.model_names import ModelNames
from cluster.api.http.reasoning_effort import thinking_fields
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.http.responses_object import Reply
from cluster.api.http.responses_stream import ResponseStream
from cluster.api.http.sse import EventStream, while_connected
from cluster.api.request_service import RequestService

FIELDS: Final = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "tools[]": ".parameters",
}


@dataclass(frozen=True, slots=True)
class Responses:
    """The route's handler."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> Json | EventStream:
        form = await read(request, ResponsesForm)
        checkpoint = self.names.checkpoint(form.model)
        request_id = new_id("resp_")
        thinking = thinking_fields(form.chat_template_kwargs, "reasoning.effort")
        with fields_named({**FIELDS, **thinking, **grammar_fields("text.format" if form.text else "tools")}):
            message = await build(request, lambda: form.message(request_id))
            core_request = await request_validation.chat_request(message, checkpoint, caller_of(request, None))
            running = await self.service.ask(core_request, checkpoint)
        reply = Reply(form, running, self.names.shown_name(form.model, checkpoint), int(time.time()))
        if form.stream:
            return EventStream(ResponseStream(reply).events())
        return Json(await while_connected(request, lambda: _whole_response(reply)))


async def _whole_response(reply: Reply) -> dict[str, Any]:
    (whole,) = await gather_answers(reply.running)
    assert whole.finish
    return reply.finish_object(items_of(reply, whole), whole.finish, whole.reasoned.tokens)


def items_of(reply: Reply, whole: WholeAnswer) -> Sequence[dict[str, Any]]:
    """Return the output items in the order of generation. An empty answer has one empty message."""
    tokens = [entry(t, reply.running) for t in whole.tokens] if reply.form.logprobs else []
    items = []
    for part in whole.parts or (AnswerPart(),):
        if part.call:
            items.append(reply.call(new_id("fc_"), part.call.id, part.call.name, part.call.arguments))
        elif part.reasoning:
            items.append(reply.reasoning(new_id("rs_"), part.text))
        else:
            items.append(reply.message(new_id("msg_"), part.text, tokens))
            tokens = []  # the first message has all log-probabilities; another message follows only after a call
    if whole.finish:
        items[-1]["status"] = reply.ending(whole.finish)
    return items
