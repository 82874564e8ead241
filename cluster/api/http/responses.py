"""POST /v1/responses: the route's handler, and the output items of a response that is not streamed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from cluster.api.http.answer_assembly import AnswerPart, WholeAnswer, gather_answers
from cluster.api.http.body import read
from cluster.api.http.chat_submission import submit_chat
from cluster.api.http.json_response import Json, new_id
from cluster.api.http.logprobs import entry
from cluster.api.http.model_names import ModelNames
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.http.responses_object import Reply
from cluster.api.http.responses_stream import ResponseStream
from cluster.api.http.sse import EventStream, while_connected
from cluster.api.request_service import RequestService


@dataclass(frozen=True, slots=True)
class Responses:
    """The route's handler."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> Json | EventStream:
        form = await read(request, ResponsesForm)
        checkpoint = self.names.checkpoint(form.model)
        running = await submit_chat(self.service, request, form, new_id("resp_"), checkpoint)
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
