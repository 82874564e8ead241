"""Answers HTTP requests that standbys pass on to the coordinator that leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from starlette.types import ASGIApp, Message, Scope

from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.transport.rich_errors import abort
from cluster.v1 import leader_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def answer_passed(app: ASGIApp, requests: AsyncIterator[pb.PassHttpRequest], context: Context) -> None:
    """Let ``app`` answer one passed request. The standby has checked Host and Origin."""
    try:
        first = await anext(requests, None)
        if first is None or not first.HasField("head"):
            raise InvalidRequest("a passed HTTP request begins with its head")
    except MacpipeError as e:
        await abort(context, e)
    body_ended = False

    async def receive() -> Message:
        nonlocal body_ended
        if body_ended:
            await asyncio.Event().wait()  # a client that leaves cancels the call
        part = await anext(requests, None)
        body_ended = part is None
        return {"type": "http.request", "body": b"" if part is None else part.body, "more_body": not body_ended}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [pb.HttpHeader(name=bytes(name), value=bytes(value)) for name, value in message["headers"]]
            await context.write(
                pb.PassHttpResponse(head=pb.HttpResponseHead(status=message["status"], headers=headers))
            )
        elif message.get("body"):
            await context.write(pb.PassHttpResponse(body=message["body"]))

    await app(_scope(first.head), receive, send)


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
