"""The asyncio client: one method per RPC, with its deadline. Conversions and streams are in sibling modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from cluster.client import proto_encoding as encoding
from cluster.client.async_calls import AsyncStreamCall, AsyncStubs, run_blocking
from cluster.client.async_connection import AsyncCoordinatorConnection
from cluster.client.async_following import AsyncFollowedAnswer, AsyncFoundCall
from cluster.client.async_streams import AsyncLoading, AsyncStream
from cluster.client.async_training import AsyncTraining
from cluster.client.channel_setup import load_trust
from cluster.client.chat_encoding import Turn
from cluster.client.coordinator_address import choose_coordinator
from cluster.client.deadlines import answer_timeout_s, check_timeout_s
from cluster.client.options import ChatKeywords, GenerateKeywords, LoadOptions, ModelToPlan
from cluster.client.proto_decoding import decode_embeddings, decode_models, decode_tokens
from cluster.client.proto_encoding import PromptInput
from cluster.client.results import Completion, Embeddings, Model, Tokens
from cluster.client.training_encoding import encode_training
from cluster.codec.cluster_state import decode_adapter, decode_cluster_state
from cluster.codec.examination import decode_examination
from cluster.codec.plan import decode_joint_plan, decode_plan
from cluster.codec.request_trace import decode_trace
from cluster.codec.stored_models import decode_removal, decode_store
from cluster.core.cluster_state import AdapterState, ClusterState, ModelPlan
from cluster.core.examination import EXAMINE_S, MacExamination
from cluster.core.joint_plan import JointPlan
from cluster.core.limits import CONTROL_TIMEOUT_S, PLAN_TIMEOUT_S
from cluster.core.request_trace import RequestTrace
from cluster.core.stored_models import STORE_S, MacStore, StoreRemoval
from cluster.v1 import cluster_pb2, inference_pb2

if TYPE_CHECKING:
    from cluster.client.async_calls import UnaryMethod
    from cluster.core.training import TrainingOptions

Q = TypeVar("Q")
R = TypeVar("R")


class AsyncClient:
    """A connection to a coordinator: ``coordinator``, else ``MACPIPE_COORDINATOR``, else the cluster's.

    It connects at the first call and reconnects after a lost connection. It belongs to the event loop of its first
    call. Close it, or use ``async with``. ``cluster`` (else ``MACPIPE_CLUSTER``, else the cluster that this machine
    entered last, else ``default``) selects this machine's certificate, which is renewed in the background while the
    client is open. If no coordinator is named, its address is the one that was remembered, else ``127.0.0.1:7700``, and
    ``async with`` looks for it on the network if it does not answer there. Without a certificate, the client reaches
    only a coordinator on this machine.

    ``coordinator`` may name several addresses, as in ``mac-1,mac-2:7700``, of a leader and its standbys. The client
    then calls the first that answers. If a coordinator is lost, it looks for the one that leads for up to 60 s, and the
    streams of answers continue there; they need a coordinator with ``--journal``. Calls that change something are not
    sent twice. With one address, answers alone go on so: at that address, which may be a standby's, and for 10 s if
    nobody answers there any more.

    ``timeout_s`` is the default deadline of a call. Without it, answers have no deadline, ``plan`` has 60 s, and other
    calls have 10 s. ``drain`` never has a deadline. ``load`` has none either, but ends if it makes no progress. Every
    method raises subclasses of MacpipeError (``cluster.core.errors``), never gRPC's errors.
    """

    def __init__(
        self, coordinator: str | None = None, *, cluster: str | None = None, timeout_s: float | None = None
    ) -> None:
        self._choice = choose_coordinator(coordinator, cluster)
        self._timeout_s = check_timeout_s(timeout_s)
        self._connection = AsyncCoordinatorConnection(self._choice.addresses, load_trust(self._choice.cluster))

    @property
    def address(self) -> str:
        """The address of the coordinator that is called."""
        return self._connection.address

    async def generate(self, prompt: PromptInput, **options: Unpack[GenerateKeywords]) -> Completion:
        """Continue a text, or token ids, without a chat template.

        The keywords are those of GenerateKeywords and Options.
        """
        return await self.stream(prompt, **options).completion()

    def stream(self, prompt: PromptInput, **options: Unpack[GenerateKeywords]) -> AsyncStream:
        """Stream the answer of ``generate`` token by token. Not a coroutine, but needs a running event loop."""
        request = encoding.encode_generate(prompt, options)
        timeout_s = answer_timeout_s(options, self._timeout_s)
        encoding.make_resumable(request)

        def begin(left_s: float | None) -> AsyncStreamCall[inference_pb2.GenerateResponse]:
            return self._connection.stream(lambda to: to.inference.Generate, request, left_s)

        return AsyncStream(AsyncFollowedAnswer(self._connection, request.request_id, begin, timeout_s))

    async def chat(self, messages: Iterable[Turn], **options: Unpack[ChatKeywords]) -> Completion:
        """Answer a conversation as the assistant. The keywords are those of ChatKeywords and Options.

        A message is ``ChatMessage(role, content)``, ``{"role": ..., "content": ...}`` or ``(role, content)``.
        """
        return await self.stream_chat(messages, **options).completion()

    def stream_chat(self, messages: Iterable[Turn], **options: Unpack[ChatKeywords]) -> AsyncStream:
        """Stream the answer of ``chat`` token by token. Not a coroutine, but needs a running event loop."""
        request = encoding.encode_chat(messages, options)
        timeout_s = answer_timeout_s(options, self._timeout_s)
        encoding.make_resumable(request)

        def begin(left_s: float | None) -> AsyncStreamCall[inference_pb2.ChatResponse]:
            return self._connection.stream(lambda to: to.inference.Chat, request, left_s)

        return AsyncStream(AsyncFollowedAnswer(self._connection, request.request_id, begin, timeout_s))

    def resume(self, request_id: str, offset: int | Sequence[int] = 0) -> AsyncStream:
        """Stream the rest of an answer after the coordinator restarted.

        ``offset`` is the index of the first token to send; for several samples, pass one offset per sample. Not a
        coroutine, but needs a running event loop. Iterating raises RequestNotFound if the request is unknown or the
        coordinator keeps no journal, and AnswerLost if it was begun by an earlier leader whose answers this one lacks.
        """
        request, timeout_s = encoding.encode_resume(request_id, offset), self._timeout_s

        def begin(left_s: float | None) -> AsyncStreamCall[inference_pb2.GenerateResponse]:
            return self._connection.stream(lambda to: to.inference.Resume, request, left_s)

        return AsyncStream(AsyncFollowedAnswer(self._connection, request_id, begin, timeout_s, offset), offset)

    async def embed(
        self, inputs: str | Sequence[PromptInput], *, model: str = "", dimensions: int | None = None
    ) -> Embeddings:
        """Return the embedding of each input: of a text, or of several texts or lists of token ids.

        ``dimensions`` keeps only so many first numbers of each. Without ``timeout_s`` there is no deadline. Raises
        InvalidRequest for a model that makes no embeddings.
        """
        request = encoding.encode_embed(inputs, model, dimensions)
        return decode_embeddings(await self._connection.ask(lambda to: to.inference.Embed, request, self._timeout_s))

    async def tokenize(self, given: str | Iterable[Turn], *, model: str = "") -> Tokens:
        """Tokenize a text, or messages after the chat template is applied."""
        request = encoding.encode_tokenize(given, model)
        return decode_tokens(await self._ask(lambda to: to.inference.Tokenize, request))

    async def models(self) -> tuple[Model, ...]:
        """Return the loaded models, each followed by it with each of its adapters, and then those that are not loaded.

        A coordinator with a single model lists it only while it is loaded.
        """
        return decode_models(await self._ask(lambda to: to.inference.ListModels, inference_pb2.ListModelsRequest()))

    async def abort(self, request_id: str) -> None:
        """Abort a live request of any client. Raise RequestNotFound if there is none with this id."""
        await self._change(lambda to: to.inference.Abort, encoding.encode_abort(request_id))

    async def trace(self, request_id: str = "") -> RequestTrace:
        """Return the way of a request's frames through the stages; "" means the caller's newest request.

        Raise RequestNotFound if the coordinator does not remember it. ``cluster.codec.chrome_trace`` converts it.
        """
        return decode_trace(await self._ask(lambda to: to.inference.Trace, encoding.encode_trace(request_id)))

    async def cluster(self) -> ClusterState:
        """Return the cluster's state: workers, stages and live requests."""
        return decode_cluster_state(await self._ask(lambda to: to.cluster.GetCluster, cluster_pb2.GetClusterRequest()))

    def load(self, model: str, **options: Unpack[LoadOptions]) -> AsyncLoading:
        """Plan, load, link and warm up a model. ``await client.load(...).wait()`` waits until it serves.

        ``model`` is an id, a folder, or a name of a configured model, which is loaded with its configured options if no
        others are given. Raise TypeError for an unknown option.
        """
        request = encoding.encode_load(model, options)
        if not self._follows:
            return AsyncLoading(self._connection.stream(lambda to: to.cluster.LoadModel, request))
        return AsyncLoading(AsyncFoundCall(self._connection, lambda to: to.cluster.LoadModel, request))

    def train(
        self,
        model: str,
        options: TrainingOptions,
        files: Mapping[str, Path],
        *,
        workers: int | None = None,
        layers: str | None = None,
    ) -> AsyncTraining:
        """Train adapters of a model. Requests are refused until the training ends.

        ``files`` are the JSON lines of the data sets ``train``, ``valid`` and ``test``, and ``adapters``, a safetensors
        file to begin with. ``workers`` and ``layers`` are as in LoadOptions.
        """
        messages: Any = encode_training(model, options, files, workers, layers)

        def choose(to: AsyncStubs) -> Any:
            return to.cluster.Train

        if not self._follows:
            return AsyncTraining(self._connection.stream(choose, messages))
        return AsyncTraining(AsyncFoundCall(self._connection, choose, messages))

    async def plan(self, model: str, **options: Unpack[LoadOptions]) -> ModelPlan:
        """Return the plan for a model and its predicted speed, without loading it. Options as for ``load``."""
        request = encoding.encode_plan(model, options)
        return decode_plan(await self._ask(lambda to: to.cluster.Plan, request, PLAN_TIMEOUT_S))

    async def plan_models(self, models: Iterable[ModelToPlan]) -> JointPlan:
        """Return which of several models fit at once, and where, as if nothing was loaded."""
        request = encoding.encode_plan_models(models)
        return decode_joint_plan(await self._ask(lambda to: to.cluster.PlanModels, request, PLAN_TIMEOUT_S))

    async def unload(self, name: str = "", *, every: bool = False) -> tuple[str, ...]:
        """Unload a model: end its live requests and free the workers' memory. Return the names of what was unloaded.

        ``name`` may be any name of it; "" is the only one that is loaded, and ``every`` means all. Raise ModelNotFound
        if there is no such model, or if several are loaded and none is named.
        """
        request = encoding.encode_unload(name, every=every)
        reply = await self._change(lambda to: to.cluster.UnloadModel, request)
        return tuple(reply.names)

    async def add_adapter(self, name: str, folder: str, *, model: str = "") -> AdapterState:
        """Load an adapter of mlx-lm for a served model, from a folder on the coordinator's Mac.

        ``model`` is a name of the model; "" is the default one. Requests name the adapter with ``adapter=name``. Others
        go on meanwhile. There is no deadline.
        """
        request = encoding.encode_add_adapter(name, folder, model)
        reply = await self._connection.ask(lambda to: to.cluster.AddAdapter, request, None, repeatable=False)
        return decode_adapter(reply.adapter)

    async def remove_adapter(self, name: str, *, model: str = "") -> int:
        """Remove an adapter, and end its live requests. Return how many. Raise ModelNotFound if there is none."""
        request = encoding.encode_remove_adapter(name, model)
        reply = await self._change(lambda to: to.cluster.RemoveAdapter, request, PLAN_TIMEOUT_S)
        return reply.ended_requests

    async def drain(self, worker: str, *, undo: bool = False) -> ClusterState:
        """Move a worker's layers to other workers without interrupting requests. It gets no layers until ``undo``.

        Wait until the other workers have loaded; there is no deadline. Raise NoPlan if they cannot hold the layers,
        WorkerLost if the worker does not exist or does not answer.
        """
        request = cluster_pb2.DrainRequest(worker=worker, undo=undo)
        reply = await self._connection.ask(lambda to: to.cluster.Drain, request, None, repeatable=False)
        return decode_cluster_state(reply.cluster)

    async def hand_over(self, standby: str = "") -> str:
        """Have a standby lead in the coordinator's place, one that is in sync for "". Return its name.

        Answers go on there. Raise NotServing if there is no such standby, or if it is not in sync.
        """
        request = cluster_pb2.HandOverRequest(standby=standby)
        reply = await self._connection.ask(lambda to: to.cluster.HandOver, request, None, repeatable=False)
        return reply.standby

    async def examine(self) -> tuple[MacExamination, ...]:
        """Have each worker examine its Mac, as ``macpipe doctor`` does, and return what they find. Nothing is changed.

        It needs an admin's certificate. A worker that does not answer has a finding that says so.
        """
        request = cluster_pb2.ExamineClusterRequest()
        reply = await self._ask(lambda to: to.cluster.ExamineCluster, request, EXAMINE_S + 2 * CONTROL_TIMEOUT_S)
        return tuple(map(decode_examination, reply.macs))

    async def stored_models(self) -> tuple[MacStore, ...]:
        """Return the models in the stores of the cluster's Macs, and which of their layers. It needs an admin.

        A Mac that cannot be asked has an entry with a ``problem``.
        """
        request = cluster_pb2.ListStoresRequest()
        reply = await self._ask(lambda to: to.cluster.ListStores, request, 2 * STORE_S + CONTROL_TIMEOUT_S)
        return tuple(map(decode_store, reply.stores))

    async def remove_stored(self, *models: str) -> tuple[StoreRemoval, ...]:
        """Remove models, by id or fingerprint, from the stores of all Macs. Return what became of them on each Mac.

        Raise ModelNotFound if no Mac has one of them, ModelInUse if one is in use; nothing has been removed then. It
        needs an admin.
        """
        request = cluster_pb2.RemoveFromStoresRequest(models=models)
        usual_s = (2 + len(models)) * STORE_S + CONTROL_TIMEOUT_S
        reply = await self._change(lambda to: to.cluster.RemoveFromStores, request, usual_s)
        return tuple(map(decode_removal, reply.removals))

    async def close(self) -> None:
        """Close the connection. Running calls end with Aborted."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        if not self._choice.named:
            self._connection.use_address(await run_blocking(self._choice.find))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(
        self, choose: Callable[[AsyncStubs], UnaryMethod[Q, R]], request: Q, usual_s: float = CONTROL_TIMEOUT_S
    ) -> R:
        return await self._connection.ask(choose, request, self._timeout_s or usual_s)

    async def _change(
        self, choose: Callable[[AsyncStubs], UnaryMethod[Q, R]], request: Q, usual_s: float = CONTROL_TIMEOUT_S
    ) -> R:
        return await self._connection.ask(choose, request, self._timeout_s or usual_s, repeatable=False)

    @property
    def _follows(self) -> bool:
        return len(self._choice.addresses) > 1
