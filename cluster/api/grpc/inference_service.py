"""The gRPC InferenceService: generation, chat, tokenization and aborts. A call that ends early ends its request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import grpc

from cluster.api import request_validation
from cluster.api.grpc import proto_encoding
from cluster.api.request_service import RequestService, RunningRequest
from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.core.limits import MAX_SAMPLES
from cluster.core.request import Request, TokenEvent
from cluster.security.roles import Role
from cluster.security.trust import Trust
from cluster.transport.rich_errors import abort
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceServiceServicer

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Reply = TypeVar("Reply", pb.GenerateResponse, pb.ChatResponse)


class InferenceServicer(InferenceServiceServicer):
    """Serves InferenceService for one coordinator."""

    def __init__(self, service: RequestService, trust: Trust) -> None:
        self._service = service
        self._coordinator = service.coordinator
        self._trust = trust

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async for reply in self._answer(request, request_validation.generate_request, pb.GenerateResponse, context):
            yield reply

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        async for reply in self._answer(request, request_validation.chat_request, pb.ChatResponse, context):
            yield reply

    async def _answer(
        self,
        message: pb.GenerateRequest | pb.ChatRequest,
        build_request: Callable[..., Awaitable[Request]],
        reply: type[Reply],
        context: Context,
    ) -> AsyncIterator[Reply]:
        try:
            checkpoint = self._coordinator.checkpoint(message.model)
            request = await build_request(message, checkpoint, self._caller(context))
            running = await self._service.ask(request, checkpoint)
            async for message_out in self._stream_events(running, reply):
                yield message_out
        except MacpipeError as e:
            await abort(context, e)

    async def _stream_events(self, running: RunningRequest, reply: type[Reply]) -> AsyncIterator[Reply]:
        request = running.request
        checkpoint = running.checkpoint
        async with aclosing(running.events) as events:
            yield reply(prompt=proto_encoding.prompt_info(request, checkpoint.shape.model.name))
            async for event in events:
                if isinstance(event, TokenEvent):
                    yield reply(token=proto_encoding.token_event(event, checkpoint.tokenizer))
                else:
                    yield reply(finish=proto_encoding.finish_info(event))

    def _owner(self, context: Context) -> str | None:
        """Return the client whose requests the caller may end; None means every client's.

        Admins, the coordinator, and every caller without a cluster (all are on this Mac) may end every request.
        """
        party = self._trust.party(context.auth_context())
        return None if party is None or party.role in (Role.ADMIN, Role.COORDINATOR) else self._caller(context).client

    def _caller(self, context: Context) -> request_validation.Caller:
        left_s = context.time_remaining()
        deadline = None if left_s is None else time.monotonic() + left_s
        return request_validation.Caller(client_name(self._trust, context), deadline)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        try:
            checkpoint = self._coordinator.checkpoint("")
            if len(request.offsets) > MAX_SAMPLES:
                raise InvalidRequest(
                    f"{len(request.offsets)} offsets were given; send at most {MAX_SAMPLES}", field="offsets"
                )
            offsets = tuple(request.offsets) or (request.offset,)
            running = await self._service.resume(request.request_id, offsets, self._caller(context).client, checkpoint)
            async for reply in self._stream_events(running, pb.GenerateResponse):
                yield reply
        except MacpipeError as e:
            await abort(context, e)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        try:
            checkpoint = self._coordinator.checkpoint(request.model)
            tokenized = await request_validation.tokenize_bounded(request, checkpoint)
        except MacpipeError as e:
            await abort(context, e)
        return pb.TokenizeResponse(ids=tokenized.ids, texts=tokenized.texts)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        try:
            shape = self._coordinator.checkpoint("").shape
        except MacpipeError:
            return pb.ListModelsResponse()
        model = pb.Model(
            id=shape.model.name,
            layers=shape.layers,
            max_context=shape.max_context,
            fingerprint=shape.model.fingerprint,
        )
        return pb.ListModelsResponse(models=[model])

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        try:
            await self._service.abort(request.request_id, self._owner(context))
        except MacpipeError as e:
            await abort(context, e)
        return pb.AbortResponse()


def client_name(trust: Trust, context: Context) -> str:
    """Return the caller's name: the party of its certificate in a cluster, from whichever address it calls."""
    auth_context: Any = context.auth_context()
    party = trust.party(auth_context)
    return f"{party.role}.{party.id}" if party else _anonymous_name(context)


def _anonymous_name(context: Context) -> str:
    """Return a hash of the credential that was sent, else the address without its port."""
    metadata = dict(context.invocation_metadata() or ())
    credential = str(metadata.get("authorization", ""))
    return hashlib.sha256(credential.encode()).hexdigest() if credential else context.peer().rpartition(":")[0]
