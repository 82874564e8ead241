"""The gRPC InferenceService: generation, chat, tokenization and aborts. A call that ends early ends its request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

import anyio
import grpc

from cluster.api import request_validation
from cluster.api.embeddings import TextEmbedder
from cluster.api.grpc import proto_encoding
from cluster.api.grpc.proto_decoding import (
    chat_params,
    embed_params,
    field_names,
    generate_params,
    known_tokens,
    tokenize_prompt,
)
from cluster.api.request_service import RequestService, RunningRequest
from cluster.api.requests import AnswerParams, Caller, PreparedRequest, rename_fields
from cluster.codec.request_trace import encode_trace
from cluster.coordinator.model_host import HeldModel
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.adapter import join_model_name, name_of_key
from cluster.core.errors import MacpipeError
from cluster.core.request import FinishEvent, PromptLogprobs, TokenEvent
from cluster.security.passed_caller import caller_certificate
from cluster.security.roles import Role
from cluster.security.trust import Trust
from cluster.transport.parsing_thread import PARSING
from cluster.transport.rich_errors import abort
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceServiceServicer

IGNORED_METADATA: Final = "x-macpipe-ignored"
"""Initial metadata: the names of fields that were ignored, separated by commas."""
FALLBACK_METADATA: Final = "x-macpipe-fallback"
"""Initial metadata: the name of the model that answers, if the requested one cannot be served now."""
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Message = TypeVar("Message", pb.GenerateRequest, pb.ChatRequest)
Params = TypeVar("Params", bound=AnswerParams)
Reply = TypeVar("Reply", pb.GenerateResponse, pb.ChatResponse)


class InferenceServicer(InferenceServiceServicer):
    """Serves InferenceService for one coordinator."""

    def __init__(self, service: RequestService, trust: Trust) -> None:
        self._service = service
        self._coordinator = service.coordinator
        self._trust = trust

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with self._answer(request, generate_params, request_validation.generate_request, context) as answer:
            running, info = answer
            for reply in _yield_opening(running, info):
                yield reply
            async for event in running.all_events:
                yield _encode_generated(event, running)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        async with self._answer(request, chat_params, request_validation.chat_request, context) as (running, info):
            yield pb.ChatResponse(prompt=info)
            async for event in running.events:
                yield _encode_event(pb.ChatResponse, event, running)

    @asynccontextmanager
    async def _answer(
        self,
        message: Message,
        decode: Callable[[Message], Params],
        validate: Callable[[Params, int, ModelInfo, Caller], Awaitable[PreparedRequest]],
        context: Context,
    ) -> AsyncIterator[tuple[RunningRequest, pb.PromptInfo]]:
        """Submit the request of a message, and end it with the block. An error in the block ends the call.

        Yields it with what the client is told of it first.
        """
        async with _errors_sent(context):
            with rename_fields(field_names(message)):
                size = message.ByteSize()
                params = await PARSING.run(size, decode, message)
                async with self._hold(message.model, message.adapter) as held:
                    prepared = await validate(params, size, held.model_info, self._caller(context))
                    running = await self._service.submit(prepared.request, held.model_info)
            told = {IGNORED_METADATA: ", ".join(prepared.ignored), FALLBACK_METADATA: quote(held.fallback, safe="/:@ ")}
            if any(told.values()):
                await context.send_initial_metadata(tuple((name, value) for name, value in told.items() if value))
            async with aclosing(running.all_events):
                yield running, self._prompt_info(running, held.fallback)

    @asynccontextmanager
    async def _hold(self, model: str, adapter: str) -> AsyncIterator[HeldModel]:
        """Keep a model loaded within the block. Wait for its load if it may be loaded on demand.

        Raises the errors of ``Coordinator.served_model`` and ``OnDemand.hold``.
        """
        if self._service.on_demand is None:
            yield HeldModel(self._coordinator.served_model(model, adapter))
            return
        async with self._service.on_demand.hold(model, adapter) as held:
            yield held

    @asynccontextmanager
    async def _hold_tokenizer(self, model: str) -> AsyncIterator[ModelInfo]:
        """Keep a model's tokenizer within the block. Raises the errors of ``OnDemand.hold_tokenizer``."""
        if self._service.on_demand is None:
            yield self._coordinator.served_model(model)
            return
        async with self._service.on_demand.hold_tokenizer(model) as model_info:
            yield model_info

    def _owner(self, context: Context) -> str | None:
        """Return the client whose requests the caller may end or trace; None means every client's.

        Admins, the coordinator, and every caller without a cluster (all are on this Mac) may do so with every request.
        """
        party = self._trust.party(caller_certificate(self._trust, context))
        return None if party is None or party.role in (Role.ADMIN, Role.COORDINATOR) else self._caller(context).client

    def _caller(self, context: Context) -> Caller:
        left_s = context.time_remaining()
        deadline = None if left_s is None else time.monotonic() + left_s
        client = client_name(self._trust, context)
        return Caller(client, deadline, strict=self._service.strict)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with _errors_sent(context):
            known = known_tokens(request)
            running = await self._service.resume(request.request_id, known, self._caller(context).client)
            async with aclosing(running.all_events):
                for reply in _yield_opening(running, self._prompt_info(running)):
                    yield reply
                async for event in running.all_events:
                    yield _encode_generated(event, running)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        async with _errors_sent(context):
            caller, size = self._caller(context), request.ByteSize()
            with rename_fields({"prompt": "inputs"}), self._service.bodies.open(caller.client) as charge:
                params = await PARSING.run(size, embed_params, request)
                async with self._hold(request.model, "") as held:
                    dimensions = request.dimensions or None
                    embedder = TextEmbedder.of(self._service, held, caller, size, charge, dimensions)
                    vectors, tokens = await embedder.embed(params)
                    name = self._coordinator.deployments.given_name(held.model_info)
                embeddings = await anyio.to_thread.run_sync(proto_encoding.embeddings, vectors)
        return pb.EmbedResponse(model=name, embeddings=embeddings, prompt_tokens=tokens)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with _errors_sent(context):
            with rename_fields({"prompt": "text"}):
                size = request.ByteSize()
                prompt = await PARSING.run(size, tokenize_prompt, request)
                async with self._hold_tokenizer(request.model) as model_info:
                    tokenized = await request_validation.list_tokens(prompt, size, model_info)
        return pb.TokenizeResponse(ids=tokenized.ids, texts=tokenized.texts)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        models = [model for info in self._coordinator.deployments.loaded_models() for model in self._list_model(info)]
        waiting = [pb.Model(id=name, unloaded=True) for name in self._coordinator.deployments.unloaded_names()]
        return pb.ListModelsResponse(models=(*models, *waiting))

    def _prompt_info(self, running: RunningRequest, fallback: str = "") -> pb.PromptInfo:
        name = self._coordinator.deployments.given_name(running.model_info)
        shown = join_model_name(name, name_of_key(running.request.adapter))
        return proto_encoding.prompt_info(running.request, shown, fallback)

    def _list_model(self, model_info: ModelInfo) -> list[pb.Model]:
        """Return a loaded model, and it with each of its adapters."""
        shape, name = model_info.shape, self._coordinator.deployments.given_name(model_info)
        return [
            pb.Model(
                id=join_model_name(name, adapter),
                layers=shape.layers,
                max_context=shape.max_context,
                fingerprint=shape.model.fingerprint,
            )
            for adapter in ("", *(a.ref.name for a in model_info.adapters.served))
        ]

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        async with _errors_sent(context):
            await self._service.abort(request.request_id, self._owner(context))
        return pb.AbortResponse()

    async def Trace(self, request: pb.TraceRequest, context: Context) -> pb.TraceResponse:
        async with _errors_sent(context):
            trace = await self._service.trace(request.request_id, self._owner(context))
        return await anyio.to_thread.run_sync(encode_trace, trace)


@asynccontextmanager
async def _errors_sent(context: Context) -> AsyncIterator[None]:
    """Send a ``MacpipeError`` of the block to the client as the status of its call."""
    try:
        yield
    except MacpipeError as e:
        await abort(context, e)


def _yield_opening(running: RunningRequest, info: pb.PromptInfo) -> Iterator[pb.GenerateResponse]:
    """Yield what is told of the prompt first, and its first token if its log-probabilities follow."""
    yield pb.GenerateResponse(prompt=info)
    if running.request.prompt_logprobs is not None:
        first = proto_encoding.first_prompt_token(running.request, running.model_info.tokenizer)
        yield pb.GenerateResponse(prompt_logprobs=first)


def _encode_generated(event: PromptLogprobs | TokenEvent | FinishEvent, running: RunningRequest) -> pb.GenerateResponse:
    if isinstance(event, PromptLogprobs):
        piece = proto_encoding.prompt_logprobs(event, running.request, running.model_info.tokenizer)
        return pb.GenerateResponse(prompt_logprobs=piece)
    return _encode_event(pb.GenerateResponse, event, running)


def _encode_event(reply: type[Reply], event: TokenEvent | FinishEvent, running: RunningRequest) -> Reply:
    if isinstance(event, TokenEvent):
        return reply(token=proto_encoding.token_event(event, running.model_info.tokenizer))
    return reply(finish=proto_encoding.finish_info(event))


def client_name(trust: Trust, context: Context) -> str:
    """Return the caller's name: the party of its certificate in a cluster, from whichever address it calls."""
    party = trust.party(caller_certificate(trust, context))
    return f"{party.role}.{party.id}" if party else _anonymous_name(context)


def _anonymous_name(context: Context) -> str:
    """Return a name for a caller without a certificate: a hash of its credential, or its address without the port."""
    metadata = dict(context.invocation_metadata() or ())
    credential = str(metadata.get("authorization", ""))
    return hashlib.sha256(credential.encode()).hexdigest() if credential else context.peer().rpartition(":")[0]
