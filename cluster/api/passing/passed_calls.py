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

from cluster.api.passing.leader_channel import LeaderChannel
from cluster.core.errors import ConnectionLost, MacpipeError, NotLeader
from cluster.security.passed_caller import CALLER_METADATA, is_passed, presented_certificate
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.rich_errors import STATUS_METADATA_KEY, abort, from_rpc_error

Context: TypeAlias = "aio.ServicerContext[bytes, bytes]"
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
PASSED_METADATA: Final = "x-macpipe-passed"
"""Request metadata: a standby has passed the call on."""
_KEPT: Final = ("authorization",)
"""Request metadata that is passed on."""
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

        async def pass_on(requests: AsyncIterator[bytes], context: Context) -> None:
            await self._pass_on(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(pass_on)

    async def _pass_on(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            if _was_passed(context):  # two standbys that take each other for the leader would pass it back and forth
                raise NotLeader("this coordinator stands by; ask the one that leads")
            address, channel = self._leader.open()
        except MacpipeError as e:
            await abort(context, e)
        body = _CountedRequests(requests, self._bodies, self._client(context))
        timeout_s = context.time_remaining()
        start: Any = channel.stream_stream(method, request_serializer=None, response_deserializer=None)
        call = start(body.read(), timeout=timeout_s, metadata=_request_metadata(context))
        body.on_refusal = call.cancel
        try:
            if initial := _passed_back(await call.initial_metadata()):
                await context.send_initial_metadata(initial)
            async for reply in call:
                await context.write(reply)
        except aio.AioRpcError as e:
            await self._fail(e, address, context)
        except asyncio.CancelledError:
            if not body.refusal:
                raise
        finally:
            call.cancel()
        if body.refusal:
            await abort(context, body.refusal)

    async def _fail(self, error: aio.AioRpcError, address: str, context: Context) -> None:
        """End the call as the leader did; if the leader is lost, so that the client looks for the next one."""
        trailing: Any = error.trailing_metadata() or ()
        carried = tuple((key, value) for key, value in trailing if key == STATUS_METADATA_KEY)
        lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) and not carried
        if not lost:
            await context.abort(error.code(), error.details() or "", carried)
        known = from_rpc_error(error, address)
        if error.code() is grpc.StatusCode.CANCELLED or isinstance(known, ConnectionLost):
            await abort(context, ConnectionLost(f"the coordinator that leads was lost at {address} during the call"))
        await abort(context, self._leader.leave(address))


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
