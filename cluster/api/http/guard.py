"""What stands before every route: who may ask, an id for each request, and no error without a body.

It checks Host and Origin, so that a web page that somebody visits cannot use the machine's own API, and sends no CORS
header. It knows no route.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.address import is_loopback
from cluster.api.http.errors import error_response, internal_error
from cluster.errors import Forbidden, MacpipeError

_ID: Final = re.compile(r"[\w.:-]{1,64}", re.ASCII)
Observe = Callable[[str, str, int, float], None]
"""Told of each response: method, path, status, seconds."""


class Guard:
    """Wraps the application, which listens on loopback alone: a request for another host was led here by a trick."""

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        reply = _Reply(send, scope, _request_id(headers))
        try:
            self._admit(headers)
            await self._app(scope, receive, reply.send)
        except MacpipeError as e:
            await reply.fail(e, receive)
        except Exception as e:  # the surface's edge; what was answered with 500 has been told and logged already
            if reply.status != 500:
                await reply.fail(internal_error(e, reply.id), receive)
        finally:
            self._observe(scope["method"], scope["path"], reply.status, reply.seconds)

    def _admit(self, headers: Headers) -> None:
        host = _host_of(f"//{headers.get('host', '')}")
        if not host or not is_loopback(host):
            raise Forbidden(
                f"this is not {host[:64] or 'a host without a name'}; call it by its address, such as localhost"
            )
        origin = headers.get("origin")
        if origin is not None and _place_of(origin) != headers["host"].lower():
            raise Forbidden(f"web pages of {origin[:128]} may not use this API: it takes no calls from other sites")


def _place_of(origin: str) -> str:
    """Host and port of an origin; empty where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower().rstrip(".")
    except ValueError:
        return ""


def _request_id(headers: Headers) -> str:
    """The client's own id where it is harmless in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"


class _Reply:
    """One response on its way: it gets the id's header, and an error while nothing was sent yet."""

    def __init__(self, send: Send, scope: Scope, request_id: str) -> None:
        self._send, self._scope, self.id = send, scope, request_id
        self._began = time.monotonic()
        self.status = 0
        scope["request_id"] = request_id

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    async def fail(self, error: MacpipeError, receive: Receive) -> None:
        if self.status:
            return  # headers are out: closing the connection unfinished is all that can be said
        await error_response(self._scope["path"], error)(self._scope, receive, self.send)
