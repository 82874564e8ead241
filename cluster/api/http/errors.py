"""Errors as HTTP clients read them: OpenAI's body, or Anthropic's on its own routes. Nothing of a prompt is in them."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.api.http.json_response import Json
from cluster.core.errors import MacpipeError, PromptTooLong
from cluster.core.limits import UNAVAILABLE_S
from cluster.core.text import with_subject

log = logging.getLogger(__name__)

ANTHROPIC_ROUTES: Final = "/v1/messages"
_COME_BACK: Final = frozenset({429, 503})
"""These always say when."""
_OPENAI_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
)
_ANTHROPIC_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
)


def openai_error(error: MacpipeError) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``."""
    status = error.http_status
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"message": error.sentence, "type": kind, "param": error.field or None, "code": _code(error)}
    return {"error": body}


def anthropic_error(error: MacpipeError) -> dict[str, Any]:
    """``{"type": "error", "error": {type, message}}``; the field stands before the sentence."""
    status = error.http_status
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = with_subject(error.field, error.sentence)
    return {"type": "error", "error": {"type": kind, "message": message}}


def _code(error: MacpipeError) -> str:
    """What OpenAI calls it where clients look for that name, else our own reason in small letters."""
    if isinstance(error, PromptTooLong):
        return "context_length_exceeded"
    return error.details.get("code", error.reason.lower())


def error_response(path: str, error: MacpipeError) -> Json:
    """The response that ends a request with ``error``."""
    body = anthropic_error(error) if path.startswith(ANTHROPIC_ROUTES) else openai_error(error)
    headers = {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    retry_after_s = UNAVAILABLE_S if error.retry_after_s is None else error.retry_after_s
    if error.http_status in _COME_BACK or error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    return Json(body, error.http_status, headers)


async def on_macpipe_error(request: Request, error: Exception) -> Json:
    """Starlette's handler for our own tree."""
    assert isinstance(error, MacpipeError)
    return error_response(request.url.path, error)


async def on_http_exception(request: Request, error: Exception) -> Json:
    """Starlette's handler for what its router refuses: no such route, or not by this method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        sentence = f"{path} does not take {method}; it takes {(error.headers or {}).get('Allow', 'other methods')}"
    elif error.status_code == 404:
        sentence = f"there is no {path} here; GET /openapi.json lists what there is"
    else:
        sentence = error.detail
    refusal = routing_error(error.status_code, sentence)
    response = error_response(path, refusal)
    response.headers.update(error.headers or {})
    return response


async def on_fault(request: Request, error: Exception) -> Json:
    """Starlette's handler for everything else: a fault of ours."""
    return error_response(request.url.path, internal_error(error, request.scope["request_id"]))


def routing_error(status: int, sentence: str) -> MacpipeError:
    """An error that only HTTP knows, such as 405."""
    refusal = MacpipeError(sentence, code={404: "unknown_url", 405: "method_not_allowed"}.get(status, "invalid"))
    refusal.http_status = status  # type: ignore[misc]  # this one instance's
    return refusal


def internal_error(error: Exception, request_id: str) -> MacpipeError:
    """What a client is told of a fault of ours: where to find it in the log, not what it was."""
    log.error("request %s failed", request_id, exc_info=error)
    return MacpipeError(f"macpipe failed; its log says more under the request id {request_id}", code="internal_error")


def sentence_of(error: Exception, request_id: str) -> MacpipeError:
    """``error`` as one of ours; what is not, is a fault of ours."""
    return error if isinstance(error, MacpipeError) else internal_error(error, request_id)


HANDLERS: Final[Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]]] = MappingProxyType(
    {MacpipeError: on_macpipe_error, HTTPException: on_http_exception, Exception: on_fault}
)
"""What Starlette calls for each kind of error."""
