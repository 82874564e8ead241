"""What stands before every route: who may ask, an id for each request, and no error without a body.

It asks ``Sites`` by whose leave a page calls, and the ``Door`` for a key. It knows no route.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.byte_budget import ByteBudget
from cluster.api.http.authorization import KEY, Authorizer
from cluster.api.http.body import CHARGE
from cluster.api.http.caller_identity import client_name
from cluster.api.http.errors import error_response, internal_error
from cluster.api.http.origin_policy import OriginPolicy
from cluster.core.errors import InvalidRequest, MacpipeError

_ID: Final = re.compile(r"[\w.:-]{1,64}", re.ASCII)
Observe = Callable[[str, str, int, float], None]
"""Told of each response: method, path, status, seconds."""


class RequestMiddleware:
    """Wraps the application: ``origin_policy`` may call it, and ``authorizer`` lets in who has what a route needs.

    ``bodies`` counts the bytes that requests hold, until each has ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        observe: Observe,
        authorizer: Authorizer,
        origin_policy: OriginPolicy | None = None,
        bodies: ByteBudget | None = None,
    ) -> None:
        self._app, self._observe, self._authorizer, self._origins = (
            app,
            observe,
            authorizer,
            origin_policy or OriginPolicy(),
        )
        self._bodies = bodies or ByteBudget()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        reply = _Reply(send, scope, _request_id(headers), lambda: self._headers(scope, headers))
        try:
            await self._answer(scope, headers, receive, reply)
        except MacpipeError as e:
            await reply.fail(e, receive)
        except Exception as e:  # the surface's edge; what was answered with 500 has been told and logged already
            if reply.status != 500:
                await reply.fail(internal_error(e, reply.id), receive)
        finally:
            self._observe(scope["method"], scope["path"], reply.status, reply.seconds)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, reply: _Reply) -> None:
        if is_ambiguous(scope, headers):
            reply.closing = True
            raise InvalidRequest(
                "the request's headers state the length of its body in two ways; send content-length alone, or "
                "transfer-encoding alone, in HTTP/1.1",
                field="transfer-encoding",
            )
        self._origins.check(headers)
        if (answer := self._origins.preflight(scope["method"], headers)) is not None:
            await Response(status_code=204, headers=answer)(scope, receive, reply.send)
            return
        with self._authorizer.authorize(scope, headers), self._bodies.open(client_name(Request(scope))) as charge:
            scope[CHARGE] = charge
            await self._app(scope, receive, reply.send)

    def _headers(self, scope: Scope, headers: Headers) -> Mapping[str, str]:
        """What every response has, errors as well."""
        return {**self._origins.cross(headers.get("origin")), **self._authorizer.figures(scope.get(KEY))}


def is_ambiguous(scope: Scope, headers: Headers) -> bool:
    """Whether a proxy in front may see another end of the body than we do, and smuggle a request in behind it.

    RFC 9112, 6.1: the connection is closed after such a request.
    """
    return "transfer-encoding" in headers and ("content-length" in headers or scope.get("http_version") == "1.0")


def _request_id(headers: Headers) -> str:
    """The client's own id where it is harmless in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"


class _Reply:
    """One response on its way: it gets the id's header and ``more``, and an error while nothing was sent yet."""

    def __init__(self, send: Send, scope: Scope, request_id: str, more: Callable[[], Mapping[str, str]]) -> None:
        self._send, self._scope, self.id, self._more = send, scope, request_id, more
        self._began = time.monotonic()
        self.closing = False
        self.status = 0
        scope["request_id"] = request_id

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            close = {"connection": "close"} if self.closing else {}
            MutableHeaders(scope=message).update({"x-request-id": self.id, **self._more(), **close})
        await self._send(message)

    async def fail(self, error: MacpipeError, receive: Receive) -> None:
        if self.status:
            return  # headers are out: closing the connection unfinished is all that can be said
        await error_response(self._scope["path"], error)(self._scope, receive, self.send)
