"""Submits a conversation, in whichever form a route takes it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from starlette.requests import Request

from cluster.api.http.adjustments import adjustments_of
from cluster.api.http.answer_submission import AnswerSubmission
from cluster.api.http.body import build, form_size
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.model_names import ModelNames
from cluster.api.http.passed_answer import passed_answer
from cluster.api.request_service import RequestService, RunningRequest
from cluster.api.request_validation import chat_request, generate_request
from cluster.api.requests import ChatParams, GenerateParams, rename_fields
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import AnswerLost, RequestNotFound
from cluster.core.known_tokens import KnownTokens
from cluster.core.request import FinishEvent, TokenEvent
from cluster.core.request import Request as InferenceRequest


class ConversationForm(Protocol):
    """The body of a route that answers a conversation."""

    @property
    def model(self) -> str | None:
        """The name of the model that is to answer; None for the default one."""

    def params(self, request_id: str) -> ChatParams:
        """Translate the body. Raises ``InvalidRequest``, naming the field."""

    def field_names(self) -> Mapping[str, str]:
        """Map parameters to the form's fields, for the errors of later checks."""


def chat_submission(
    service: RequestService, names: ModelNames, request: Request, form: ConversationForm, request_id: str
) -> AnswerSubmission[RunningRequest, TokenEvent | FinishEvent]:
    """Return the submission of a form's conversation."""
    return AnswerSubmission(
        names,
        request,
        form.model,
        request_id,
        check=lambda: form.params(request_id),
        submit_to=lambda model_info: submit_chat(service, request, form, request_id, model_info),
        events_of=lambda running: aclosing(running.events),
    )


async def submit_chat(
    service: RequestService, request: Request, form: ConversationForm, request_id: str, model_info: ModelInfo
) -> RunningRequest:
    """Submit the conversation of a form, with an answer that fits the context.

    What this changes of the request is noted in its ``Adjustments``. Raises the errors of every check, each with the
    form's field.
    """
    params = await build(request, lambda: form.params(request_id))
    return await submit_params(service, request, params, form.field_names(), model_info)


async def submit_params(
    service: RequestService,
    request: Request,
    params: ChatParams | GenerateParams,
    names: Mapping[str, str],
    model_info: ModelInfo,
) -> RunningRequest:
    """Submit parameters, which ``names`` maps to the form's fields. See ``submit_chat``."""
    adjustments = adjustments_of(request.scope)
    caller = replace(caller_of(request, None), shorten=not adjustments.strict, strict=adjustments.strict)
    with rename_fields(names):
        if isinstance(params, ChatParams):
            prepared = await chat_request(params, form_size(request), model_info, caller)
        else:
            prepared = await generate_request(params, form_size(request), model_info, caller)
        running = await submit_prepared(service, request, prepared.request, model_info)
    adjustments.ignore(names.get(name, name) for name in prepared.ignored)
    if params.max_tokens is not None and prepared.request.max_tokens < params.max_tokens:
        adjustments.max_tokens = prepared.request.max_tokens
    return running


async def submit_prepared(
    service: RequestService, request: Request, prepared: InferenceRequest, model_info: ModelInfo
) -> RunningRequest:
    """Submit what an HTTP request asks for; if an earlier leader may have begun to answer it, resume that answer.

    Raises the errors of ``RequestService.submit`` and ``RequestService.resume``.
    """
    passed = passed_answer(request)
    if passed is None:
        return await service.submit(prepared, model_info)
    if passed.resumed:
        try:
            return await service.resume(prepared.id, (KnownTokens(0),), prepared.client)
        except (RequestNotFound, AnswerLost):
            if passed.is_begun:
                raise
    return await service.submit(replace(prepared, resumable=True), model_info)
