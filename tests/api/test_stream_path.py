"""The path of a request and of its tokens: the thread that decodes it, the async generators that a token passes."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest

from cluster.api import request_validation
from cluster.api.daemon import DESCRIPTORS
from cluster.api.grpc import proto_decoding
from cluster.api.grpc.inference_service import InferenceServicer
from cluster.api.http import sse
from cluster.api.http.app import application
from cluster.api.http.passed_answer import PART, SILENCE
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.api.requests import Conversation
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.event_gate import AnswerEvent
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.model_host import HeldModel
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import DoesNotFit, MacpipeError, ModelTooLarge
from cluster.core.limits import MAX_MESSAGES
from cluster.core.request import Accepted, ChatMessage, FinishEvent, FinishReason, Request, TokenEvent, Usage
from cluster.security.credentials import LocalTrust
from cluster.transport.grpc_setup import bind, public_server
from cluster.transport.message_bounds import MessageBounds
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceServiceStub, add_InferenceServiceServicer_to_server
from fuzz.targets.asked import served
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio


class WatchedQueue(AnswerQueue):
    """Counts the async generators that wait for a token. ``Accepted``, which comes first, is read on its own."""

    accepted = False
    depth = 0

    async def __anext__(self) -> AnswerEvent:
        frame = sys._getframe()
        generators = 0
        while frame := frame.f_back:  # type: ignore[assignment]  # None at the end
            generators += bool(frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)
        if self.accepted:
            self.depth = max(self.depth, generators)
        self.accepted = True
        return await super().__anext__()


class OneToken(WorkerlessCoordinator):
    """A coordinator whose answers have one token."""

    catalog = ModelCatalog([ModelEntry("faq", LoadOrder("faq")), ModelEntry("fallen", LoadOrder("fallen"))])

    def __init__(self) -> None:
        self.answers: list[WatchedQueue] = []

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        return served()

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        batch = EventBatch()
        answer = WatchedQueue(batch, samples=request.samples)
        answer.put(Accepted())
        for i in range(request.samples):
            answer.put(TokenEvent(0, 5, "a", sample=i, logprob=-1.0))
            answer.put(FinishEvent(FinishReason.STOP, "", Usage(1, 1), 1.0, 1.0, sample=i))
        batch.deliver()
        self.answers.append(answer)
        return answer

    @property
    def depth(self) -> int:
        return max(answer.depth for answer in self.answers)


@pytest.fixture
def coordinator() -> OneToken:
    return OneToken()


@pytest.fixture
def service(coordinator: OneToken) -> RequestService:
    return RequestService(coordinator, Metrics())  # type: ignore[arg-type]


@pytest.fixture
async def stub(service: RequestService) -> AsyncIterator[Any]:
    trust = LocalTrust()
    server = public_server(trust, MessageBounds(DESCRIPTORS, service.bodies, lambda context: context.peer()))
    add_InferenceServiceServicer_to_server(InferenceServicer(service, trust), server)
    port = bind(server, trust, "127.0.0.1", 0)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield InferenceServiceStub(channel)
    await server.stop(None)


ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "n": 2},
    "/v1/completions": {"prompt": ["a", "b"], "logprobs": 1},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"model": "faq", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", ROUTES)
async def test_a_token_passes_three_generators_at_most_over_http(
    path: str, service: RequestService, coordinator: OneToken
) -> None:
    transport = httpx.ASGITransport(application(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        answer = await client.post(path, json={**ROUTES[path], "stream": True})
    assert answer.status_code == 200
    assert '"a"' in answer.text
    assert 1 <= coordinator.depth <= 3


class Silent(OneToken):
    """A coordinator that computes nothing until ``go_on`` is called."""

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        self.batch = EventBatch()
        answer = AnswerQueue(self.batch, samples=1)
        answer.put(Accepted())
        self.batch.deliver()
        self.answer = answer
        return answer

    def go_on(self) -> None:
        self.answer.put(TokenEvent(0, 5, "a"))
        self.answer.put(FinishEvent(FinishReason.STOP, "", Usage(1, 1), 1.0, 1.0))
        self.batch.deliver()


@pytest.mark.parametrize(
    ("path", "sign"),
    [
        ("/v1/chat/completions", b": still working"),
        ("/v1/messages", b"event: ping"),
        ("/v1/responses", b"event: response.in_progress"),
    ],
)
async def test_silence_is_broken_in_each_apis_way(path: str, sign: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts of Codex count events, not comments; the numbers of its events have no gap all the same."""
    monkeypatch.setattr(sse, "STREAM_COMMENT_S", 0.02)
    coordinator = Silent()
    service = RequestService(coordinator, Metrics())  # type: ignore[arg-type]
    silence: list[bytes] = []
    sent = await stream(path, service, sign, 3, coordinator.go_on, silence)
    assert silence
    assert all(sign in piece for piece in silence), "a standby leaves them out when it compares answers"
    numbers = [int(n) for piece in sent for n in re.findall(rb'"sequence_number":(\d+)', piece)]
    assert numbers == list(range(len(numbers)))
    assert b"".join(sent).count(b'"a"') >= 1


def body_of(path: str) -> dict[str, Any]:
    return ROUTES.get(path) or {"model": "faq", "messages": [{"role": "user", "content": "hi"}]}


def a_post(path: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "query_string": b"", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8080), "headers": [(b"host", b"localhost:8080")],
    }  # fmt: skip


async def stream(
    path: str,
    service: RequestService,
    sign: bytes,
    count: int,
    then: Callable[[], None],
    silence: list[bytes] | None = None,
    **more: Any,
) -> list[bytes]:
    """Return the pieces of a stream. ``then`` is called after so many that have ``sign``; -1: never.

    ``silence`` gets those that are marked as sent during silence.
    """
    sent: list[bytes] = []

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            sent.append(str(message["status"]).encode())
        sent.append(message.get("body", b""))
        if silence is not None and message.get(PART) == SILENCE:
            silence.append(sent[-1])
        if sign in sent[-1] and sum(sign in piece for piece in sent) == count:
            then()

    received = [{"type": "http.request", "body": json.dumps({**body_of(path), "stream": True, **more}).encode()}]

    async def receive() -> dict[str, Any]:
        return received.pop() if received else await asyncio.get_running_loop().create_future()

    async with asyncio.timeout(10):
        await application(service)(a_post(path), receive, send)  # type: ignore[arg-type]
    return sent


class OneLoad:
    """Loads the only model for requests, until ``end``; then it is there, or ``error`` is why not."""

    load_wait_s = 5.0

    def __init__(self, error: MacpipeError | None = None) -> None:
        self._ended, self._error = asyncio.Event(), error
        self.waiting = 0

    def end(self) -> None:
        self._ended.set()

    def is_ready(self, requested: str | None) -> bool:
        return self._ended.is_set()

    async def await_ready(self, requested: str | None, seconds: float) -> bool:
        return self._ended.is_set()

    @asynccontextmanager
    async def hold(
        self, requested: str | None, adapter: str = "", wait_s: float | None = None
    ) -> AsyncIterator[HeldModel]:
        self.waiting += 1
        try:
            await self._ended.wait()
        finally:
            self.waiting -= 1
        if self._error:
            raise self._error
        yield HeldModel(served(), "other" if requested == "fallen" else "")


LOADING = {
    "/v1/chat/completions": b'"delta":{}',
    "/v1/completions": b'"text":""',
    "/v1/responses": b"event: response.in_progress",
    "/v1/messages": b"event: ping",
    "/api/chat": b'"content":""',
}
"""What each API's stream repeats while a model is loaded: an event of its own, since clients count these."""


def on_demand(error: MacpipeError | None = None) -> tuple[OneLoad, RequestService]:
    coordinator, load = OneToken(), OneLoad(error)
    return load, RequestService(coordinator, Metrics(), on_demand=load)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", LOADING)
async def test_a_stream_begins_while_its_model_is_loaded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STREAM_COMMENT_S", 0.02)
    load, service = on_demand()
    more = {"echo": True} if path == "/v1/completions" else {}
    sent = b"".join(await stream(path, service, LOADING[path], 3, load.end, **more))
    load, service = on_demand()
    load.end()
    loaded = b"".join(await stream(path, service, LOADING[path], -1, load.end, **more))
    assert sent.startswith(b"200")
    for pattern in (
        rb'"text":"a+"',
        rb'"content":"a"',
        rb'"delta":"a"',
        rb'"delta":{"role":"assistant"',
        rb"event: [a-z_.]+",
    ):
        some = [
            found
            for found in re.findall(pattern, sent)
            if found not in (b"event: ping", b"event: response.in_progress")
        ]
        rest = [found for found in re.findall(pattern, loaded) if found not in (b"event: response.in_progress",)]
        assert some == rest, "the answer is that of a model that was loaded before"
    numbers = re.findall(rb'"sequence_number":(\d+)', sent)
    assert numbers == [b"%d" % i for i in range(len(numbers))]


@pytest.mark.parametrize("path", LOADING)
async def test_an_error_of_a_load_ends_the_stream_that_waits_for_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STREAM_COMMENT_S", 0.02)
    load, service = on_demand(DoesNotFit("it needs 5 GiB more"))
    sent = await stream(path, service, LOADING[path], 2, load.end)
    assert sent[0] == b"200"
    assert b"it needs 5 GiB more" in b"".join(sent)
    refused = await stream(path, service, LOADING[path], -1, load.end)
    assert refused[0] == b"503", "nothing was sent yet"
    assert b"it needs 5 GiB more" in b"".join(refused)
    load, service = on_demand(ModelTooLarge("it needs 5 GiB more"))
    load.end()
    refused = await stream(path, service, LOADING[path], -1, load.end)
    assert refused[0] == b"400", "clients do not send it again"


@pytest.mark.parametrize("path", LOADING)
async def test_a_bad_form_is_refused_before_its_model_is_loaded(path: str) -> None:
    load, service = on_demand()
    bad = {"messages": [{"role": "nobody", "content": "x"}]} if "messages" in body_of(path) else {"stop": 7}
    transport = httpx.ASGITransport(application(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        for streamed in (True, False):
            answer = await client.post(path, json={**body_of(path), **bad, "stream": streamed})
            assert answer.status_code == 400
        deep = {"n": 5, "best_of": 4, "prompt": "a"} if path == "/v1/completions" else {}
        if deep:
            answer = await client.post(path, json={**deep, "stream": True})
            assert (answer.status_code, load.waiting) == (400, 0), "it is not the form's shape that is wrong"


async def test_the_deadline_of_a_request_counts_the_time_in_which_its_model_is_loaded() -> None:
    _, service = on_demand()
    transport = httpx.ASGITransport(application(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        for seconds, status in (("0.05", 408), ("never", 400)):
            answer = await client.post(
                "/v1/messages", json=ROUTES["/v1/messages"], headers={"x-request-timeout": seconds}
            )
            assert answer.status_code == status
        streamed = {**ROUTES["/v1/messages"], "stream": True}
        answer = await client.post("/v1/messages", json=streamed, headers={"x-request-timeout": "0.05"})
    assert "deadline passed while its model was being loaded" in answer.text


async def test_a_client_that_hangs_up_leaves_no_waiting_request() -> None:
    load, service = on_demand()
    for streamed in (True, False):
        hung_up = asyncio.Event()
        body = json.dumps({**ROUTES["/v1/messages"], "stream": streamed}).encode()
        received = [{"type": "http.request", "body": body}]

        async def receive(received: list[dict[str, Any]] = received, gone: asyncio.Event = hung_up) -> dict[str, Any]:
            if received:
                return received.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None: ...

        async with asyncio.timeout(10):
            asking = asyncio.ensure_future(application(service)(a_post("/v1/messages"), receive, send))  # type: ignore[arg-type]
            while not load.waiting:
                await asyncio.sleep(0.005)
            hung_up.set()
            await asking
        assert load.waiting == 0


async def test_the_model_that_answers_in_place_of_another_is_named() -> None:
    load, service = on_demand()
    load.end()
    transport = httpx.ASGITransport(application(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        answer = await client.post("/v1/messages", json={**ROUTES["/v1/messages"], "model": "fallen"})
    assert answer.headers["x-macpipe-fallback"] == "other"
    assert answer.json()["model"] == "faq", "the name of what is served"


@pytest.mark.parametrize("method", ["Generate", "Chat"])
async def test_grpc_names_the_model_that_answers_in_place_of_another(method: str, stub: Any, service: Any) -> None:
    service.on_demand = OneLoad()
    service.on_demand.end()
    for asked, fallback in (("fallen", "other"), ("faq", "")):
        hi = pb.ChatMessage(role="user", content="hi")
        generate = method == "Generate"
        message = pb.GenerateRequest(model=asked, text="hi") if generate else pb.ChatRequest(model=asked, messages=[hi])
        call = getattr(stub, method)(message)
        assert [reply.prompt.fallback async for reply in call if reply.HasField("prompt")] == [fallback]
        assert dict(await call.initial_metadata()).get("x-macpipe-fallback", "") == fallback


@pytest.mark.parametrize("method", ["Generate", "Chat"])
async def test_a_token_passes_three_generators_at_most_over_grpc(method: str, stub: Any, coordinator: OneToken) -> None:
    hi = pb.ChatMessage(role="user", content="hi")
    message = pb.GenerateRequest(text="hi") if method == "Generate" else pb.ChatRequest(messages=[hi])
    events = [reply.WhichOneof("event") async for reply in getattr(stub, method)(message)]
    assert events == ["prompt", "token", "finish"]
    assert coordinator.depth == 3


async def test_a_long_conversation_is_decoded_and_checked_off_the_loop(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPC cancels calls that the loop does not take up within 30 s, which 300 long conversations at once reached."""
    threads: dict[str, list[int]] = {"decode": [], "check": []}
    decode, check = proto_decoding.decode_message, request_validation.check_conversation

    def decode_here(message: pb.ChatMessage) -> ChatMessage:
        threads["decode"].append(threading.get_ident())
        return decode(message)

    def check_here(conversation: Conversation, context: int) -> None:
        threads["check"].append(threading.get_ident())
        check(conversation, context)

    monkeypatch.setattr(proto_decoding, "decode_message", decode_here)
    monkeypatch.setattr(request_validation, "check_conversation", check_here)
    turns = [pb.ChatMessage(role="user", content="hi")] * MAX_MESSAGES
    with pytest.raises(grpc.RpcError) as refused:
        await anext(aiter(stub.Chat(pb.ChatRequest(messages=turns))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (len(threads["decode"]), len(threads["check"])) == (MAX_MESSAGES, 1)
    assert threading.get_ident() not in {*threads["decode"], *threads["check"]}
