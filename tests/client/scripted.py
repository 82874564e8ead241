"""A scripted coordinator: both public services on a real grpc.aio server and a real socket."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc

from cluster.core.errors import MacpipeError, RequestNotFound
from cluster.security.trust import Trust
from cluster.transport.grpc_setup import CONTROL_OPTIONS, bind, public_server
from cluster.transport.rich_errors import abort
from cluster.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

Answer = Callable[[Any, Any], AsyncIterator[Any]]
WORDS = ("Mac", "s", " pass", " layers", " on")


def prompt_event(kind: Any = inference_pb2.GenerateResponse, request_id: str = "r1", seed: int = 7) -> Any:
    info = inference_pb2.PromptInfo(request_id=request_id, model="faq", prompt_tokens=4, seed=seed, max_tokens=512)
    return kind(prompt=info)


def token_event(index: int, text: str, kind: Any = inference_pb2.GenerateResponse, **more: Any) -> Any:
    return kind(token=inference_pb2.TokenEvent(index=index, token=100 + index, text=text, **more))


def finish_event(
    tokens: int,
    text: str = "",
    kind: Any = inference_pb2.GenerateResponse,
    reason: int = inference_pb2.FINISH_REASON_STOP,
) -> Any:
    stages = [
        inference_pb2.StageFigures(
            worker=f"mac-{name}", start_layer=4 * i, end_layer=4 * i + 4, compute_ms=8.5, wire_ms=0.5, wait_ms=0.25
        )
        for i, name in enumerate("ab")
    ]
    info = inference_pb2.FinishInfo(
        reason=reason,
        text=text,
        usage=inference_pb2.Usage(prompt_tokens=4, completion_tokens=tokens, cached_tokens=1),
        timings=inference_pb2.Timings(ttft_ms=12.5, tpot_ms=2.5, tokens_per_second=400.0),
        stages=stages,
    )
    return kind(finish=info)


def answer_of(request: Any, words: tuple[str, ...] = WORDS, tail: str = ".") -> list[Any]:
    """The events of a whole answer to a GenerateRequest or a ChatRequest."""
    chat = isinstance(request, inference_pb2.ChatRequest)
    kind = inference_pb2.ChatResponse if chat else inference_pb2.GenerateResponse
    tokens = [token_event(i, word, kind) for i, word in enumerate(words)]
    return [prompt_event(kind, request.request_id or "r1"), *tokens, finish_event(len(words), tail, kind)]


def cluster_reply(state: int = cluster_pb2.SERVING_STATE_SERVING, **more: Any) -> cluster_pb2.GetClusterResponse:
    workers = [
        cluster_pb2.Worker(
            id=f"id-{name}",
            name=f"mac-{name}",
            version="0.1.0",
            control_address=f"10.0.0.{i}:5000",
            data_address=f"10.0.0.{i}:5001",
            chip="Apple M4 Max",
            backend="metal",
            mlx_version="0.32.4",
            memory_total=64 << 30,
            memory_limit=48 << 30,
            memory_used=20 << 30,
            memory_peak=21 << 30,
            reachable=name == "a",
            problem="" if name == "a" else "no answer for 3 s",
        )
        for i, name in enumerate("ab", 1)
    ]
    stages = [
        cluster_pb2.Stage(index=i, worker=f"mac-{n}", start_layer=4 * i, end_layer=4 * i + 4, weight_bytes=9 << 30)
        for i, n in enumerate("ab")
    ]
    live = [
        cluster_pb2.LiveRequest(
            request_id="r1", state=cluster_pb2.REQUEST_STATE_DECODE, prompt_tokens=4, completion_tokens=2, lane=1
        ),
        cluster_pb2.LiveRequest(request_id="r2", state=cluster_pb2.REQUEST_STATE_QUEUED, prompt_tokens=9, lane=-1),
    ]
    facts: dict[str, Any] = {"model": "faq", "layers": 8, "max_context": 512, "max_sequences": 4, "epoch": 1} | more
    return cluster_pb2.GetClusterResponse(
        cluster="default",
        version="0.1.0",
        state=state,
        workers=workers,
        stages=stages,
        requests=live,
        queued=1,
        **facts,
    )


class Script(inference_pb2_grpc.InferenceServiceServicer, cluster_pb2_grpc.ClusterServiceServicer):
    """The coordinator's behaviour. A test replaces ``answer``, ``rest``, ``load`` or ``refusal``.

    ``seen`` has the requests, ``peers`` the connection of each.
    """

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.peers: list[str] = []
        self.certify: Callable[[bytes], bytes] | None = None
        self.refusal: MacpipeError | None = None
        self.cancelled = threading.Event()
        self.cluster = cluster_reply()
        self.plan = cluster_pb2.PlanResponse()
        self.joint_plan = cluster_pb2.PlanModelsResponse()
        self.examined: list[cluster_pb2.MacExamination] | None = None
        self.stores: list[cluster_pb2.MacStore] = []
        self.removals: list[cluster_pb2.StoreRemoval] = []

    async def answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for event in answer_of(request):
            yield event

    async def rest(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The answer to Resume, by default that nothing is known of the request."""
        await abort(context, RequestNotFound(f"request {request.request_id} has no answer that can be resumed"))
        yield

    async def load(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for done in (0, 50, 100):
            for i, name in enumerate("ab"):
                step = cluster_pb2.StageProgress(
                    worker=f"mac-{name}", start_layer=4 * i, end_layer=4 * i + 4, done_bytes=done, total_bytes=100
                )
                yield cluster_pb2.LoadModelResponse(progress=step)
        yield cluster_pb2.LoadModelResponse(ready=self.cluster)

    async def _play(self, script: Answer, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._meet(request, context)
        try:
            async for event in script(request, context):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def _meet(self, request: Any, context: Any) -> None:
        self.seen.append(request)
        self.peers.append(context.peer())
        if self.refusal is not None:
            await abort(context, self.refusal)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(self.answer, request, context):
            yield event

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(self.answer, request, context):
            yield event

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(self.rest, request, context):
            yield event

    async def LoadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._play(self.load, request, context):
            yield event

    async def Tokenize(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return inference_pb2.TokenizeResponse(ids=[1, 2], texts=["a", "b"])

    async def Embed(self, request: Any, context: Any) -> Any:
        """Return two numbers for each text: its length, and a half."""
        await self._meet(request, context)
        lengths = [len(one.text) for one in request.inputs]
        packed = [struct.pack("<2f", length, 0.5) for length in lengths]
        return inference_pb2.EmbedResponse(model=request.model, embeddings=packed, prompt_tokens=sum(lengths))

    async def ListModels(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="faq", layers=8, max_context=512)])

    async def Abort(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return inference_pb2.AbortResponse()

    async def GetCluster(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return self.cluster

    async def Plan(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return self.plan

    async def PlanModels(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return self.joint_plan

    async def ExamineCluster(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        if self.examined is None:  # an older coordinator
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        return cluster_pb2.ExamineClusterResponse(macs=self.examined)

    async def ListStores(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return cluster_pb2.ListStoresResponse(stores=self.stores)

    async def RemoveFromStores(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return cluster_pb2.RemoveFromStoresResponse(removals=self.removals)

    async def UnloadModel(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        return cluster_pb2.UnloadModelResponse(names=["faq"])

    async def RenewCertificate(self, request: Any, context: Any) -> Any:
        await self._meet(request, context)
        assert self.certify
        return cluster_pb2.RenewCertificateResponse(certificate=self.certify(request.request))


class Coordinator:
    """A server with a Script in its own thread, listening on ``address``.

    With ``trust`` it is a cluster's, and takes mutual TLS.
    """

    def __init__(self, port: int = 0, trust: Trust | None = None) -> None:
        self._trust = trust
        self.script = Script()
        self.address = ""
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.close()

    def stop(self) -> None:
        """Stop at once, as a killed coordinator does."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    def add_services(self, server: grpc.aio.Server) -> None:
        """Have the server answer both services. A test that stands in for another server replaces it."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.script, server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self.script, server)

    async def _serve(self) -> None:
        server = public_server(self._trust) if self._trust else grpc.aio.server(options=CONTROL_OPTIONS)
        self.add_services(server)
        own = f"127.0.0.1:{self._port}"
        port = bind(server, self._trust, "127.0.0.1", self._port) if self._trust else server.add_insecure_port(own)
        self.address = f"127.0.0.1:{port}"
        await server.start()
        self._up.set()
        await self._stopping.wait()
        await server.stop(0)
