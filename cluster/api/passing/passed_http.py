"""The HTTP port of a standby: it checks Host and Origin, and has the coordinator that leads answer everything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api.http.errors import error_response
from cluster.api.http.middleware import ambiguity_error, is_ambiguous
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.passing.leader_channel import LeaderChannel
from cluster.core.errors import Aborted, ConnectionLost, MacpipeError
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import leader_pb2 as pb
from cluster.v1.leader_pb2_grpc import LeaderServiceStub


def passing_application(leader: LeaderChannel, origins: OriginPolicy) -> ASGIApp:
    """Return the HTTP application of a standby."""
    passed = origins.with_cors(PassedHttp(leader))

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if is_ambiguous(scope, headers):
            refusal = error_response(scope["path"], ambiguity_error())
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        try:
            origins.check(headers)
        except MacpipeError as e:
            await error_response(scope["path"], e)(scope, receive, send)
            return
        await passed(scope, receive, send)

    return application


class PassedHttp:
    """Passes each request on to the leader, and the response back as it comes."""

    def __init__(self, leader: LeaderChannel) -> None:
        self._leader = leader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _PassedReply(send)
        try:
            await self._pass_on(scope, receive, reply)
        except MacpipeError as e:
            if not reply.started:
                await error_response(scope["path"], e)(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, reply: _PassedReply) -> None:
        """Have the leader answer. Raises ``MacpipeError`` if it does not, or not to the end."""
        address, channel = self._leader.open()
        request = _PassedRequest(scope, receive)
        call: Any = LeaderServiceStub(channel).PassHttp(request.parts())
        watching = asyncio.ensure_future(request.cancel_at_disconnect(call))
        try:
            async for response in call:
                await reply.send(response)
            await reply.end()
        except aio.AioRpcError as e:
            raise self._explain(e, address) from e
        except asyncio.CancelledError:
            if not request.disconnected.is_set():
                raise
            raise Aborted("the client disconnected") from None
        finally:
            watching.cancel()
            call.cancel()

    def _explain(self, error: aio.AioRpcError, address: str) -> MacpipeError:
        known = from_rpc_error(error, address)
        if error.code() is grpc.StatusCode.CANCELLED or isinstance(known, ConnectionLost):
            return ConnectionLost(f"the coordinator that leads was lost at {address}; send the request again")
        return self._leader.leave(address) if error.code() is grpc.StatusCode.UNAVAILABLE else known


class _PassedReply:
    """The response to a client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, part: pb.PassHttpResponse) -> None:
        """Send the next part of the leader's response."""
        if part.HasField("head"):
            headers = [(header.name, header.value) for header in part.head.headers]
            self.started = True
            await self._send({"type": "http.response.start", "status": part.head.status, "headers": headers})
        else:
            await self._send({"type": "http.response.body", "body": part.body, "more_body": True})

    async def end(self) -> None:
        """Complete the response. Raises ``ConnectionLost`` if there is none."""
        if not self.started:
            raise ConnectionLost("the coordinator that leads sent no response; send the request again")
        await self._send({"type": "http.response.body", "body": b""})


class _PassedRequest:
    """The request of a client, and whether the client is still there."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope, self._receive = scope, receive
        self._complete = asyncio.Event()
        self.disconnected = asyncio.Event()

    async def parts(self) -> AsyncIterator[pb.PassHttpRequest]:
        """Yield the parts of the request as they arrive."""
        yield pb.PassHttpRequest(head=_head(self._scope))
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.disconnected.set()
                break
            if message.get("body"):
                yield pb.PassHttpRequest(body=message["body"])
            more = message.get("more_body", False)
        self._complete.set()

    async def cancel_at_disconnect(self, call: Any) -> None:
        """Cancel ``call`` once the client has left."""
        await self._complete.wait()
        while not self.disconnected.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self.disconnected.set()
        call.cancel()


def _head(scope: Scope) -> pb.HttpRequestHead:
    client = scope.get("client")
    return pb.HttpRequestHead(
        method=scope["method"],
        path=scope["path"],
        query=scope.get("query_string", b""),
        headers=[pb.HttpHeader(name=name, value=value) for name, value in scope["headers"]],
        client=client[0] if client else "",
        encrypted=scope.get("scheme") == "https",
    )
