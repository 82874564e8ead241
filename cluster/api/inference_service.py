"""InferenceService: prompts in, tokens out. A call that ends early, for whatever reason, ends its request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import grpc

from cluster.api import proto_encoding as replies
from cluster.api import request_validation
from cluster.api.request_service import RequestService, RunningRequest
from cluster.coordinator.model_reader import ModelInfo
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
    """Speaks for one coordinator, by way of its desk."""

    def __init__(self, desk: RequestService, trust: Trust) -> None:
        self._desk, self._coordinator, self._trust = desk, desk.coordinator, trust

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async for reply in self._answer(request, request_validation.generate_request, pb.GenerateResponse, context):
            yield reply

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        async for reply in self._answer(request, request_validation.chat_request, pb.ChatResponse, context):
            yield reply

    async def _answer(
        self,
        message: pb.GenerateRequest | pb.ChatRequest,
        take_in: Callable[..., Awaitable[Request]],
        reply: type[Reply],
        context: Context,
    ) -> AsyncIterator[Reply]:
        try:
            checkpoint = self._coordinator.checkpoint(message.model)
            request = await take_in(message, checkpoint, self._caller(context))
            async for answered in self._events(request, checkpoint, reply):
                yield answered
        except MacpipeError as e:
            await abort(context, e)

    async def _events(self, request: Request, checkpoint: ModelInfo, reply: type[Reply]) -> AsyncIterator[Reply]:
        asked = await self._desk.ask(request, checkpoint)
        async for told in self._stream_events(asked, reply):
            yield told

    async def _stream_events(self, asked: RunningRequest, reply: type[Reply]) -> AsyncIterator[Reply]:
        request, checkpoint = asked.request, asked.checkpoint
        async with aclosing(asked.events) as events:
            yield reply(prompt=replies.prompt_info(request, checkpoint.shape.model.name))
            async for event in events:
                if isinstance(event, TokenEvent):
                    yield reply(token=replies.token_event(event, checkpoint.tokenizer))
                else:
                    yield reply(finish=replies.finish_info(event))

    def _owner(self, context: Context) -> str | None:
        """Whose requests the caller may end: its own; anybody's (None) if it leads, or all here are of this Mac."""
        party = self._trust.party(context.auth_context())
        return None if party is None or party.role in (Role.ADMIN, Role.COORDINATOR) else self._caller(context).client

    def _caller(self, context: Context) -> request_validation.Caller:
        left = context.time_remaining()
        return request_validation.Caller(
            client_name(self._trust, context), None if left is None else time.monotonic() + left
        )

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        try:
            checkpoint = self._coordinator.checkpoint("")
            if len(request.offsets) > MAX_SAMPLES:
                raise InvalidRequest(
                    f"{len(request.offsets)} offsets were given; at most {MAX_SAMPLES}", field="offsets"
                )
            offsets = tuple(request.offsets) or (request.offset,)
            asked = await self._desk.resume(request.request_id, offsets, self._caller(context).client, checkpoint)
            async for reply in self._stream_events(asked, pb.GenerateResponse):
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
            await self._desk.abort(request.request_id, self._owner(context))
        except MacpipeError as e:
            await abort(context, e)
        return pb.AbortResponse()


def client_name(trust: Trust, context: Context) -> str:
    """Who calls: in a cluster whoever the certificate says, wherever it calls from."""
    shown: Any = context.auth_context()
    party = trust.party(shown)
    return f"{party.role}.{party.id}" if party else _caller_of(context)


def _caller_of(context: Context) -> str:
    """By the credential that was sent, as a hash, else by the address without its port."""
    metadata = dict(context.invocation_metadata() or ())
    credential = str(metadata.get("authorization", ""))
    return hashlib.sha256(credential.encode()).hexdigest() if credential else context.peer().rpartition(":")[0]
