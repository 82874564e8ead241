"""Middleware for every request: origin checks, authorization, byte accounting, request ids, and error bodies.

``OriginPolicy`` decides which web pages may call, ``Authorizer`` checks API keys. This module knows no routes.
"""

from __future__ import annotations

import copy
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.http.adjustments import begin_adjustments
from cluster.api.http.authorization import KEY, Authorizer
from cluster.api.http.body import CHARGE
from cluster.api.http.caller_identity import client_name
from cluster.api.http.errors import error_response, internal_error
from cluster.api.http.origin_policy import CheckedOrigins, OriginPolicy
from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.transport.byte_budget import ByteBudget

_ID: Final = re.compile(r"[\w.:-]{1,64}", re.ASCII)
Observe = Callable[[str, str, int, float], None]
"""Called after each response with its method, path, status (0 if none was sent) and duration in seconds."""


class RequestMiddleware:
    """Wraps an application. Requests pass the checks of ``origin_policy``, CORS, and ``AuthorizationMiddleware``.

    ``authorizer`` checks the API key that a route requires. ``bodies`` counts the bytes that each request holds until
    it ends. With ``strict`` a field that has no effect is an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        observe: Observe,
        authorizer: Authorizer,
        origin_policy: OriginPolicy | None = None,
        bodies: ByteBudget | None = None,
        *,
        strict: bool = False,
    ) -> None:
        self._strict = strict
        self._observe = observe
        self._authorizer = authorizer
        self._origins = origin_policy or OriginPolicy()
        self._authorized = AuthorizationMiddleware(app, authorizer, bodies or ByteBudget())
        self._next = self._origins.with_cors(self._authorized)

    def behind_standby(self) -> RequestMiddleware:
        """Return the same for requests that a standby passes on: it has checked Host and Origin itself."""
        passed = copy.copy(self)
        passed._origins, passed._next = CheckedOrigins(), self._authorized
        return passed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._next(scope, receive, send)
            return
        headers = Headers(scope=scope)
        adjustments = begin_adjustments(scope, strict=self._strict)
        reply = _Reply(
            send,
            scope,
            _request_id(headers),
            lambda: {**self._authorizer.rate_limit_headers(scope.get(KEY)), **adjustments.headers()},
        )
        try:
            await self._answer(scope, headers, receive, reply)
        except MacpipeError as e:
            await reply.fail(e, receive)
        except Exception as e:  # the outermost handler; an error that was answered with 500 is logged already
            if reply.status != 500:
                await reply.fail(internal_error(e, reply.id), receive)
        finally:
            self._observe(scope["method"], scope["path"], reply.status, reply.seconds)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, reply: _Reply) -> None:
        if is_ambiguous(scope, headers):
            reply.closing = True
            raise ambiguity_error()
        self._origins.check(headers)
        await self._next(scope, receive, reply.send)


class AuthorizationMiddleware:
    """Wraps an application: it checks the API key that a route requires, and counts the bytes of the request's body.

    It answers what it refuses itself, so that the CORS headers in front of it let a page read the refusal.
    """

    def __init__(self, app: ASGIApp, authorizer: Authorizer, bodies: ByteBudget) -> None:
        self._app = app
        self._authorizer = authorizer
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                held.enter_context(self._authorizer.authorize(scope, Headers(scope=scope)))
                scope[CHARGE] = held.enter_context(self._bodies.open(client_name(Request(scope))))
            except MacpipeError as e:
                await error_response(scope["path"], e)(scope, receive, send)
                return
            await self._app(scope, receive, send)


def is_ambiguous(scope: Scope, headers: Headers) -> bool:
    """Return whether a proxy in front could see a different end of the body, which allows request smuggling.

    The connection is closed after such a request (RFC 9112, section 6.1).
    """
    return "transfer-encoding" in headers and ("content-length" in headers or scope.get("http_version") == "1.0")


def ambiguity_error() -> InvalidRequest:
    """Return the error of a request that ``is_ambiguous``."""
    return InvalidRequest(
        "the length of the request's body is ambiguous; send either content-length or, in HTTP/1.1, transfer-encoding",
        field="transfer-encoding",
    )


def _request_id(headers: Headers) -> str:
    """Return the client's request id if it is safe in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"


class _Reply:
    """One response. It adds the request id and the headers that ``more`` returns.

    ``closing`` closes the connection after the response. ``status`` is 0 until the headers are sent.
    """

    def __init__(self, send: Send, scope: Scope, request_id: str, more: Callable[[], Mapping[str, str]]) -> None:
        self._send = send
        self._scope = scope
        self.id = request_id
        self._more = more
        self._started = time.monotonic()
        self.closing = False
        self.status = 0
        scope["request_id"] = request_id

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            close = {"connection": "close"} if self.closing else {}
            MutableHeaders(scope=message).update({"x-request-id": self.id, **self._more(), **close})
        await self._send(message)

    async def fail(self, error: MacpipeError, receive: Receive) -> None:
        if self.status:
            return  # the headers are sent: the client only sees that the connection closes early
        await error_response(self._scope["path"], error)(self._scope, receive, self.send)
