"""Passes gRPC calls of clients on to the coordinator that leads, as bytes, and its replies back.

The call keeps its deadline, its cancellation and its status. The leader sees the caller's own certificate, so it
decides as if it had been called itself. If the leader is lost, the call ends with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeAlias

import grpc
from grpc import aio

from cluster.api.passing.leader_channel import LeaderChannel, StandbyRemoved
from cluster.core.errors import ConnectionLost, MacpipeError, NotLeader
from cluster.security.passed_caller import CALLER_METADATA, is_passed, presented_certificate
from cluster.security.trust import PASSER_REMOVED_METADATA
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.rich_errors import STATUS_METADATA_KEY, abort, from_rpc_error
from cluster.v1 import cluster_pb2, inference_pb2

Context: TypeAlias = "aio.ServicerContext[bytes, bytes]"
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
PASSED_METADATA: Final = "x-macpipe-passed"
"""Request metadata: a standby has passed the call on."""
_KEPT: Final = ("authorization",)
"""Request metadata that is passed on."""
LOST: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL})
"""Statuses of a call without an error of macpipe's: the leader is gone, or ended the call while a message was sent."""
_STREAMING: Final = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (inference_pb2, cluster_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.client_streaming
)
_OWN: Final = "x-macpipe-"
"""Prefix of the initial metadata that is passed back."""


class PassedCalls(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its typing stub alone
    """Handles the methods of the public services. ``client`` names a caller, whose bytes ``bodies`` counts."""

    def __init__(self, leader: LeaderChannel, bodies: ByteBudget, client: Callable[[Context], str]) -> None:
        self._leader, self._bodies, self._client = leader, bodies, client

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if not is_passed(method):
            return None

        async def pass_one(request: bytes, context: Context) -> None:
            await self._pass_one(method, request, context)

        async def pass_stream(requests: AsyncIterator[bytes], context: Context) -> None:
            await self._pass_stream(method, requests, context)

        if method in _STREAMING:
            return grpc.stream_stream_rpc_method_handler(pass_stream)
        return grpc.unary_stream_rpc_method_handler(pass_one)

    async def _pass_one(self, method: str, request: bytes, context: Context) -> None:
        """Pass on a call with one request.

        It is sent with the call: grpc.aio reports a message that it cannot send any more, since the leader has answered
        already, as an error of its own in place of the leader's.
        """
        address, channel = await self._open(context)
        start: Any = channel.unary_stream(method, request_serializer=None, response_deserializer=None)
        try:
            with self._bodies.open(self._client(context)) as charge:
                charge.add(len(request))
                call = start(request, timeout=context.time_remaining(), metadata=_request_metadata(context))
                await self._pass_back(call, address, context)
        except MacpipeError as e:
            await abort(context, e)

    async def _pass_stream(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        address, channel = await self._open(context)
        body = _CountedRequests(requests, self._bodies, self._client(context))
        start: Any = channel.stream_stream(method, request_serializer=None, response_deserializer=None)
        call = start(body.read(), timeout=context.time_remaining(), metadata=_request_metadata(context))
        body.on_refusal = call.cancel
        try:
            await self._pass_back(call, address, context)
        except asyncio.CancelledError:
            if not body.refusal:
                raise
        if body.refusal:
            await abort(context, body.refusal)

    async def _open(self, context: Context) -> tuple[str, aio.Channel]:
        """Return the leader's address and channel. Abort the call if there is no leader."""
        try:
            if _was_passed(context):  # two standbys that take each other for the leader would pass it back and forth
                raise NotLeader("this coordinator stands by; ask the one that leads")
            return self._leader.open()
        except MacpipeError as e:
            await abort(context, e)

    async def _pass_back(self, call: Any, address: str, context: Context) -> None:
        """Send what the leader answers, and end the call as it does."""
        try:
            if initial := _passed_back(await call.initial_metadata()):
                await context.send_initial_metadata(initial)
            async for reply in call:
                await context.write(reply)
        except aio.AioRpcError as e:
            await self._fail(e, address, context)
        finally:
            call.cancel()

    async def _fail(self, error: aio.AioRpcError, address: str, context: Context) -> None:
        """End the call as the leader did; if the leader is lost, so that the client looks for the next one."""
        trailing: Any = error.trailing_metadata() or ()
        carried = tuple((key, value) for key, value in trailing if key == STATUS_METADATA_KEY)
        if any(key == PASSER_REMOVED_METADATA for key, _ in trailing):
            await abort(context, StandbyRemoved())
        if carried or error.code() not in LOST:
            await context.abort(error.code(), error.details() or "", carried)
        if error.code() is grpc.StatusCode.UNAVAILABLE and never_reached(error, address):
            await abort(context, self._leader.leave(address))
        await abort(context, ConnectionLost(f"the coordinator that leads was lost at {address} during the call"))


class _CountedRequests:
    """The messages of a call, each charged while it is passed on. ``refusal`` is set if one may not be held."""

    def __init__(self, requests: AsyncIterator[bytes], bodies: ByteBudget, client: str) -> None:
        self._requests, self._bodies, self._client = requests, bodies, client
        self.refusal: MacpipeError | None = None
        self.on_refusal: Callable[[], object] = lambda: None

    async def read(self) -> AsyncIterator[bytes]:
        async for message in self._requests:
            with self._bodies.open(self._client) as charge:
                try:
                    charge.add(len(message))
                except MacpipeError as e:
                    self.refusal = e
                    self.on_refusal()
                    return
                yield message


def never_reached(error: aio.AioRpcError, address: str) -> bool:
    """Return whether a call did not reach the leader, so that nothing can have been done."""
    return not isinstance(from_rpc_error(error, address), ConnectionLost)


def _was_passed(context: Context) -> bool:
    given: Any = context.invocation_metadata() or ()
    return any(key == PASSED_METADATA for key, _ in given)


def _request_metadata(context: Context) -> Metadata:
    given: Any = context.invocation_metadata() or ()
    kept = ((PASSED_METADATA, "1"), *((key, value) for key, value in given if key in _KEPT))
    certificate = presented_certificate(context)
    return (*kept, (CALLER_METADATA, certificate)) if certificate else kept


def _passed_back(initial: Any) -> Metadata:
    return tuple((key, value) for key, value in initial or () if key.startswith(_OWN))
