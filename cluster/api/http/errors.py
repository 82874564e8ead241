"""Encodes errors in OpenAI's format, or in Anthropic's and Ollama's on their routes.

Errors never contain text of a prompt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cluster.api.http.json_response import Json
from cluster.api.http.passed_answer import ERROR
from cluster.core.errors import MacpipeError, PromptTooLong
from cluster.core.limits import UNAVAILABLE_S
from cluster.core.text import with_subject

log = logging.getLogger(__name__)

ANTHROPIC_ROUTES: Final = "/v1/messages"
OLLAMA_ROUTES: Final = frozenset(
    f"/api/{name}"
    for name in (
        "chat",
        "copy",
        "create",
        "delete",
        "embed",
        "embeddings",
        "generate",
        "ps",
        "pull",
        "push",
        "show",
        "tags",
        "version",
    )
)
"""Paths under /api that are Ollama's; the others are the page's."""
_RETRYABLE: Final = frozenset({429, 503})
"""Statuses that always have a retry-after header."""
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
    """Return ``{"error": {message, type, param, code}}``."""
    status = error.http_status
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"message": error.sentence, "type": kind, "param": error.field or None, "code": _code(error)}
    return {"error": body}


def anthropic_error(error: MacpipeError) -> dict[str, Any]:
    """Return ``{"type": "error", "error": {type, message}}``; the message starts with the field.

    A prompt that is too long is described in Anthropic's own words: clients compact their conversation when they read
    them.
    """
    status = error.http_status
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = _length_message(error) if isinstance(error, PromptTooLong) else with_subject(error.field, error.sentence)
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_error(error: MacpipeError) -> dict[str, Any]:
    """Return ``{"error": message}``; the message starts with the field."""
    return {"error": with_subject(error.field, error.sentence)}


def _length_message(error: PromptTooLong) -> str:
    numbers = error.details
    if "maximum" in numbers:
        return f"prompt is too long: {numbers['tokens']} tokens > {numbers['maximum']} maximum"
    if "max_tokens" in numbers:
        return (
            f"input length and `max_tokens` exceed context limit: {numbers['tokens']} + {numbers['max_tokens']} > "
            f"{numbers['context']}, decrease input length or `max_tokens` and try again"
        )
    return f"prompt is too long: {error.sentence}"


def _code(error: MacpipeError) -> str:
    """Return OpenAI's code where clients depend on it, else the error's own code or its reason in lower case."""
    if isinstance(error, PromptTooLong):
        return "context_length_exceeded"
    return error.details.get("code", error.reason.lower())


class ErrorResponse(Json):
    """The response that ends a request with an error. Its messages carry the error for whoever passes them on."""

    def __init__(self, body: Mapping[str, Any], error: MacpipeError, headers: Mapping[str, str]) -> None:
        super().__init__(body, error.http_status, headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_error(message: Message) -> None:
            await send({**message, ERROR: self._error})

        await super().__call__(scope, receive, send_with_error)


def error_body(path: str, error: MacpipeError) -> dict[str, Any]:
    """Return what ``error`` is as JSON; ``path`` selects the format."""
    if path in OLLAMA_ROUTES:
        return ollama_error(error)
    return anthropic_error(error) if path.startswith(ANTHROPIC_ROUTES) else openai_error(error)


def error_response(path: str, error: MacpipeError) -> ErrorResponse:
    """Return the response that ends a request with ``error``; ``path`` selects the format."""
    headers = {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    retry_after_s = UNAVAILABLE_S if error.retry_after_s is None else error.retry_after_s
    if error.http_status in _RETRYABLE or error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    return ErrorResponse(error_body(path, error), error, headers)


async def on_macpipe_error(request: Request, error: Exception) -> ErrorResponse:
    """Handle a ``MacpipeError`` for Starlette."""
    assert isinstance(error, MacpipeError)
    return error_response(request.url.path, error)


async def on_http_exception(request: Request, error: Exception) -> ErrorResponse:
    """Handle an error of Starlette's router: an unknown route, or a wrong method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        sentence = f"{path} does not support {request.method}; use {allowed}"
    elif error.status_code == 404:
        sentence = f"there is no route {path}; GET /openapi.json lists all routes"
    else:
        sentence = error.detail
    response = error_response(path, routing_error(error.status_code, sentence))
    response.headers.update(error.headers or {})
    return response


async def on_fault(request: Request, error: Exception) -> ErrorResponse:
    """Handle every other exception, which is a bug in macpipe."""
    return error_response(request.url.path, internal_error(error, request.scope["request_id"]))


def routing_error(status: int, sentence: str) -> MacpipeError:
    """Return an error that exists in HTTP only, such as 405."""
    error = MacpipeError(sentence, code={404: "unknown_url", 405: "method_not_allowed"}.get(status, "invalid"))
    error.http_status = status  # type: ignore[misc]  # set on this instance only
    return error


def internal_error(error: Exception, request_id: str) -> MacpipeError:
    """Log a bug and return the error for the client: it names the log entry and hides the details."""
    log.error("http request failed: internal error request=%s", request_id, exc_info=error)
    return MacpipeError(
        f"internal error; macpipe's log has the details under the request id {request_id}", code="internal_error"
    )


def sentence_of(error: Exception, request_id: str) -> MacpipeError:
    """Return ``error`` if it is a ``MacpipeError``, else an internal error."""
    return error if isinstance(error, MacpipeError) else internal_error(error, request_id)


HANDLERS: Final[Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]]] = MappingProxyType(
    {MacpipeError: on_macpipe_error, HTTPException: on_http_exception, Exception: on_fault}
)
"""Starlette's handler for each class of error."""
