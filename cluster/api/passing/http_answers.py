"""Answers HTTP requests that standbys pass on to the coordinator that leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeAlias

import grpc
from starlette.types import ASGIApp, Message, Scope

from cluster.api.http.passed_answer import ERROR, PART, PASSED, KnownEvents, KnownPart, PassedAnswer
from cluster.core.errors import InvalidRequest, MacpipeError, NotLeader
from cluster.core.limits import LINGER_S
from cluster.transport.rich_errors import abort
from cluster.v1 import leader_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def answer_passed(
    app: ASGIApp | None, requests: AsyncIterator[pb.PassHttpRequest], context: Context, leaving: asyncio.Event
) -> None:
    """Let ``app`` answer one passed request. The standby has checked Host and Origin.

    Without ``app`` this process does not lead. Nothing is sent once ``leaving`` is set: the caller ends the call then.
    """
    try:
        first = await anext(requests, None)
        if first is None or not first.HasField("head"):
            raise InvalidRequest("a passed HTTP request begins with its head")
        passed = _passed_answer(first.head)
        exchange = _Exchange(requests, context, passed, leaving)
        if app is None:
            raise NotLeader("this coordinator stands by; ask the one that leads")
        await app({**_scope(first.head), PASSED: passed}, exchange.receive, exchange.send)
        exchange.close()
        await exchange.drain()
    except MacpipeError as e:
        await abort(context, e)


class _Exchange:
    """One request and its response, as the application sees them."""

    def __init__(
        self,
        requests: AsyncIterator[pb.PassHttpRequest],
        context: Context,
        passed: PassedAnswer,
        leaving: asyncio.Event,
    ) -> None:
        self._requests, self._context, self._leaving = requests, context, leaving
        self._known = KnownEvents(passed) if passed.events else None
        self._failure: MacpipeError | None = None
        """Why the answer ended before it had the events of its client."""
        self._failed = asyncio.Event()
        """Set once it is known that the answer is no use to the client."""
        self._body_ended = False

    async def receive(self) -> Message:
        if self._body_ended:
            await self._failed.wait()  # a client that leaves cancels the call
            return {"type": "http.disconnect"}
        part = await anext(self._requests, None)
        self._body_ended = part is None
        return {"type": "http.request", "body": part.body if part else b"", "more_body": not self._body_ended}

    async def send(self, message: Message) -> None:
        """Send the next part of the response; none of an error while the client has more than has come."""
        if self._leaving.is_set():
            await asyncio.Event().wait()  # an error of this leader; the standby asks the next one
        if ERROR in message and self._known and self._known.is_behind:
            self._failure = message[ERROR]
            self._failed.set()
        elif message["type"] == "http.response.start":
            if message["status"] != HTTPStatus.OK:
                self._known = None  # no answer follows
            headers = [pb.HttpHeader(name=bytes(name), value=bytes(value)) for name, value in message["headers"]]
            head = pb.HttpResponseHead(status=message["status"], headers=headers)
            await self._context.write(pb.PassHttpResponse(head=head))
        elif piece := message.get("body"):
            part = message.get(PART, 0)
            if not (self._known and self._known.is_known(piece, part)):
                await self._context.write(pb.PassHttpResponse(body=piece, part_of_answer=part))
            elif self._known.differs:
                self._failed.set()

    async def drain(self) -> None:
        """Discard the rest of a body that the application did not read, for a while: the standby is sending it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._body_ended:
                    await self.receive()

    def close(self) -> None:
        """Raise the error that ended a resumed stream, or ``AnswerDiffers``, if it has not had its client's events."""
        if self._failure:
            raise self._failure
        if self._known:
            self._known.close()


def _passed_answer(head: pb.HttpRequestHead) -> PassedAnswer:
    known = {one.part: KnownPart(one.events, one.digest) for one in head.known if one.events}
    return PassedAnswer(head.request_id, head.created, head.resumed, known)


def _scope(head: pb.HttpRequestHead) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": head.method,
        "scheme": "https" if head.encrypted else "http",
        "path": head.path,
        "raw_path": head.path.encode(),
        "root_path": "",
        "query_string": head.query,
        "headers": [(header.name, header.value) for header in head.headers],
        "client": (head.client, 0),
        "server": None,
        "state": {},
    }
