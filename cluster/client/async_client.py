"""The asynchronous client: the twin of ``cluster.client.client``, and await where that waits. For asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from grpc import aio

from cluster.client import proto_decoding as replies
from cluster.client import proto_encoding as requests
from cluster.client.async_streams import AsyncLoading, AsyncStream
from cluster.client.certificate_renewal import OwnRenewal
from cluster.client.channel_setup import means, trust_in
from cluster.client.chat_encoding import Turn
from cluster.client.cluster_state import ClusterState, ModelPlan
from cluster.client.coordinator_address import coordinator_address
from cluster.client.deadlines import answer_timeout_s, check_timeout_s, closed_error, failures_told
from cluster.client.options import ChatKeywords, LoadOptions, Options
from cluster.client.proto_encoding import Prompt
from cluster.client.results import Completion, Model, Tokens
from cluster.core.limits import CONTROL_TIMEOUT_S, PLAN_TIMEOUT_S
from cluster.v1 import cluster_pb2, inference_pb2
from cluster.v1.cluster_pb2_grpc import ClusterServiceStub
from cluster.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from cluster.v1.cluster_pb2_grpc import ClusterServiceAsyncStub
    from cluster.v1.inference_pb2_grpc import InferenceServiceAsyncStub

    Q = TypeVar("Q")
    R = TypeVar("R")


class AsyncClient:
    """A connection to a coordinator: ``coordinator``, else ``MACPIPE_COORDINATOR``, else ``127.0.0.1:7700``.

    It connects at the first call, and again after a break, and belongs to the event loop of its first call; close it,
    or use ``async with``. In ``cluster``, else ``MACPIPE_CLUSTER``, else ``default``, it shows the certificate that
    this machine has there; without one it speaks with this machine alone. ``timeout_s`` bounds every call that brings
    no bound of its own; without it answers may take as long as they take, and other calls 10 s. Every method raises a
    MacpipeError of ``cluster.core.errors``, and nothing of gRPC's.
    """

    def __init__(
        self, coordinator: str | None = None, *, cluster: str | None = None, timeout_s: float | None = None
    ) -> None:
        self.address = coordinator_address(coordinator)
        self._timeout_s = check_timeout_s(timeout_s)
        trust = trust_in(cluster)
        self._renewal = OwnRenewal(trust)
        self._credentials, self._grpc_options = means(trust, self.address)
        self._opened: aio.Channel | None = None
        self._closed = False

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a text, or token ids, without a chat template. See Options for the keywords."""
        return await self.stream(prompt, **options).completion()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """``generate``, token by token. Needs a running event loop, but no await."""
        request = requests.generate_request(prompt, options)
        call = self._inference.Generate(request, timeout=answer_timeout_s(options, self._timeout_s))
        return AsyncStream(call, self.address)

    async def chat(self, messages: Iterable[Turn], **options: Unpack[ChatKeywords]) -> Completion:
        """Answer a conversation as the assistant. See ChatKeywords and Options for the keywords.

        A message is ``ChatMessage(role, content)``, ``{"role": ..., "content": ...}`` or ``(role, content)``.
        """
        return await self.stream_chat(messages, **options).completion()

    def stream_chat(self, messages: Iterable[Turn], **options: Unpack[ChatKeywords]) -> AsyncStream:
        """``chat``, token by token. Needs a running event loop, but no await."""
        request = requests.chat_request(messages, options)
        call = self._inference.Chat(request, timeout=answer_timeout_s(options, self._timeout_s))
        return AsyncStream(call, self.address)

    def resume(self, request_id: str, offset: int | Sequence[int] = 0) -> AsyncStream:
        """The rest of an answer, from token ``offset`` on, after its coordinator died and was started again; one offset
        a sample where several were asked for. Needs a running event loop, but no await.

        Iterating raises RequestNotFound, also where the coordinator keeps no journal.
        """
        request = requests.resume_request(request_id, offset)
        return AsyncStream(self._inference.Resume(request, timeout=self._timeout_s), self.address, offset)

    async def tokenize(self, given: str | Iterable[Turn], *, model: str = "") -> Tokens:
        """The token ids that the model would read for a text, or for messages with the chat template."""
        return replies.tokens(await self._ask(self._inference.Tokenize, requests.tokenize_request(given, model)))

    async def models(self) -> tuple[Model, ...]:
        """The models that are being served: none or one."""
        return replies.models(await self._ask(self._inference.ListModels, inference_pb2.ListModelsRequest()))

    async def abort(self, request_id: str) -> None:
        """End a live request, whoever asked for it; raises RequestNotFound."""
        await self._ask(self._inference.Abort, requests.abort_request(request_id))

    async def cluster(self) -> ClusterState:
        """The state of everything: workers, stages, live requests."""
        return replies.cluster_state(await self._ask(self._cluster.GetCluster, cluster_pb2.GetClusterRequest()))

    def load(
        self,
        model: str,
        **options: Unpack[LoadOptions],
    ) -> AsyncLoading:
        """Plan, load, link and warm a model; ``await client.load(...).wait()`` waits for the end.

        Raises TypeError for an unknown option.
        """
        request = requests.load_request(model, options)
        return AsyncLoading(self._cluster.LoadModel(request), self.address)

    async def plan(self, model: str, **options: Unpack[LoadOptions]) -> ModelPlan:
        """Who would hold what of a model, and how fast that would be; nothing is loaded. Options as for ``load``."""
        request = requests.plan_request(model, options)
        return replies.plan(await self._ask(self._cluster.Plan, request, PLAN_TIMEOUT_S))

    async def unload(self) -> None:
        """End live requests and free the workers' memory."""
        await self._ask(self._cluster.UnloadModel, cluster_pb2.UnloadModelRequest())

    async def drain(self, worker: str, *, undo: bool = False) -> ClusterState:
        """Move a worker's layers to others while requests go on, and give it none until that is undone.

        Waits for as long as the others load. Raises NoPlan where they cannot hold the layers, WorkerLost where no such
        worker answers.
        """
        with failures_told(self.address, lambda: self._closed):
            reply = await self._cluster.Drain(cluster_pb2.DrainRequest(worker=worker, undo=undo))
        return replies.cluster_state(reply.cluster)

    async def close(self) -> None:
        """Close the connection; calls that still run end with Aborted."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _channel(self) -> aio.Channel:
        if self._closed:
            raise closed_error()
        if self._opened is None:  # not before: a channel belongs to the loop that runs while it is made
            self._opened = aio.secure_channel(self.address, self._credentials, options=self._grpc_options)
        return self._opened

    @property
    def _inference(self) -> InferenceServiceAsyncStub:
        return InferenceServiceStub(self._channel)

    @property
    def _cluster(self) -> ClusterServiceAsyncStub:
        return ClusterServiceStub(self._channel)

    async def _renew(self) -> None:
        """Get a further certificate for the next client of this machine, where it is time."""
        if self._renewal.wanted:
            request = cluster_pb2.RenewCertificateRequest(request=self._renewal.request())
            with suppress(aio.AioRpcError):  # the old one is good for weeks
                reply = await self._cluster.RenewCertificate(request, timeout=CONTROL_TIMEOUT_S)
                self._renewal.install(reply.certificate)

    async def _ask(
        self, method: aio.UnaryUnaryMultiCallable[Q, R], request: Q, usual_s: float = CONTROL_TIMEOUT_S
    ) -> R:
        await self._renew()
        with failures_told(self.address, lambda: self._closed):
            return await method(request, timeout=self._timeout_s or usual_s)
