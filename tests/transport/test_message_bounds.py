"""gRPC requests, members' too: fields are counted on the wire, and bytes are charged until a call ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api import limits
from cluster.api.conversation_validation import check_messages
from cluster.api.daemon import DESCRIPTORS
from cluster.api.grpc.proto_decoding import messages, template_options
from cluster.core.errors import Busy, InvalidRequest, TooLarge
from cluster.core.limits import (
    FREE_BODY_BYTES,
    MAX_FIELDS,
    MAX_MESSAGES,
    MAX_PROMPT_IDS,
    MAX_STAGE_FIELDS,
    MAX_TOOLS,
    RETRY_AFTER_S,
)
from cluster.core.request import ChatMessage, ToolCall
from cluster.security.credentials import LocalTrust
from cluster.transport import message_bounds
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.grpc_setup import CONTROL_OPTIONS, bind, control_server
from cluster.transport.message_bounds import MessageBounds, count_fields
from cluster.transport.parsing_thread import ParsingThread
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import store_pb2 as store
from cluster.v1 import worker_pb2 as worker
from cluster.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from cluster.v1.store_pb2_grpc import StoreServiceServicer, add_StoreServiceServicer_to_server
from cluster.v1.worker_pb2_grpc import (
    WorkerServiceServicer,
    WorkerServiceStub,
    add_WorkerServiceServicer_to_server,
)


def field(number: int, value: bytes) -> bytes:
    """Encode a protobuf field of bytes; ``value`` may be as long as a gRPC message."""
    size, left = b"", len(value)
    while left > 0x7F:
        size, left = size + bytes([left & 0x7F | 0x80]), left >> 7
    return bytes([number << 3 | 2]) + size + bytes([left]) + value


MANY = MAX_FIELDS + 1
HOSTILE: list[tuple[type[Message], bytes]] = [
    (pb.ChatRequest, field(3, b"") * MANY),
    (pb.ChatRequest, field(3, field(4, b"") * MANY)),
    (pb.ChatRequest, field(3, field(4, b"")) * MANY),
    (pb.ChatRequest, field(4, b"") * MANY),
    (pb.ChatRequest, field(9, field(1, b"") * MANY)),
    (pb.GenerateRequest, field(5, field(8, b"\x08\x01") * MANY)),
    (pb.GenerateRequest, field(6, field(2, b"a") * MANY)),
    (pb.GenerateRequest, field(4, b"\x08\x01" * MANY)),
    (pb.GenerateRequest, field(4, field(1, bytes(MAX_PROMPT_IDS + 1)))),
    (pb.ResumeRequest, field(3, bytes(MAX_PROMPT_IDS + 1))),
    (pb.GenerateRequest, b"\xf8\x01\x01" * MANY),
    (pb.GenerateRequest, b"\xfb\x01\xfc\x01" * MANY),
]


@pytest.mark.parametrize(("kind", "data"), HOSTILE, ids=[f"{i}" for i in range(len(HOSTILE))])
def test_too_many_fields_are_refused_unparsed(kind: type[Message], data: bytes) -> None:
    with pytest.raises(TooLarge):
        count_fields(data, kind.DESCRIPTOR)


def test_the_longest_requests_that_are_meant_are_taken() -> None:
    call = pb.ToolCall(id="c", name="f", arguments="{}")
    turn = pb.ChatMessage(role="assistant", content="a" * 500, tool_calls=[call])
    chat = pb.ChatRequest(messages=[turn] * (MAX_MESSAGES - 100))
    ids = pb.GenerateRequest(tokens=pb.TokenIds(ids=[2**31] * MAX_PROMPT_IDS))
    for message in (chat, ids, pb.GenerateRequest(text="é" * 2**20)):
        count_fields(message.SerializeToString(), message.DESCRIPTOR)


def fields(message: Message) -> int:
    """Return the number of set fields on the wire, those of submessages included."""
    count = 0
    for descriptor, value in message.ListFields():
        values = value if descriptor.is_repeated and descriptor.message_type else [value]
        if descriptor.message_type and descriptor.message_type.GetOptions().map_entry:
            count += 3 * len(value)
        else:
            strings = descriptor.is_repeated and descriptor.cpp_type == descriptor.CPPTYPE_STRING
            count += len(value) if strings else len(values)
            count += sum(fields(one) for one in values if isinstance(one, Message))
    return count


TEXT = st.text("aé", max_size=3)
CALLS = st.lists(st.builds(pb.ToolCall, id=TEXT, name=TEXT, arguments=TEXT), max_size=3)
TURNS = st.lists(st.builds(pb.ChatMessage, role=TEXT, content=TEXT, tool_calls=CALLS), max_size=4)
SAMPLING = st.builds(
    pb.SamplingOptions,
    temperature=st.none() | st.floats(0, 2),
    seed=st.none() | st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(st.integers(1, 2**32 - 1), st.floats(1, 2), max_size=3),
)
CHATS = st.builds(
    pb.ChatRequest,
    messages=TURNS,
    sampling=SAMPLING,
    stop=st.builds(pb.StopOptions, stop=st.lists(TEXT, max_size=3), ignore_eos=st.booleans()),
)


@settings(max_examples=150, deadline=None, database=None)
@given(CHATS)
def test_fields_are_counted_exactly(chat: pb.ChatRequest) -> None:
    data, count = chat.SerializeToString(), fields(chat)
    count_fields(data, chat.DESCRIPTOR, count)
    if len(data) > count - 1 >= 0:
        with pytest.raises(TooLarge):
            count_fields(data, chat.DESCRIPTOR, count - 1)


@settings(max_examples=150, deadline=None, database=None)
@given(st.binary(max_size=64))
def test_what_is_malformed_is_counted_to_an_end(data: bytes) -> None:
    try:
        count_fields(data * 2, pb.ChatRequest.DESCRIPTOR, 40)
    except TooLarge:
        assert len(data) > 20


def test_messages_and_tools_are_counted_before_they_are_copied() -> None:
    with pytest.raises(InvalidRequest):
        messages([pb.ChatMessage()] * (MAX_MESSAGES + 1))
    with pytest.raises(InvalidRequest):
        template_options(pb.TemplateOptions(tools=[pb.Tool()] * (MAX_TOOLS + 1)))
    calls = (ToolCall("c", "f", "[" + "[]," * limits.MAX_ELEMENTS),)
    with pytest.raises(TooLarge):
        check_messages([ChatMessage("assistant", "", "", calls)], 4096)


class Echo(InferenceServiceServicer):
    def __init__(self) -> None:
        self.held: list[int] = []
        self.bodies = ByteBudget(8 * FREE_BODY_BYTES)
        self.go_on = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.held.append(self.bodies.held)
        await self.go_on.wait()
        yield pb.GenerateResponse(prompt=pb.PromptInfo(prompt_tokens=len(request.text)))

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(ids=[len(request.text)])


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Echo, InferenceServiceStub, aio.Channel]]:
    echo = Echo()
    server = aio.server(interceptors=[MessageBounds(DESCRIPTORS, echo.bodies, lambda _: "client")])
    add_InferenceServiceServicer_to_server(echo, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield echo, InferenceServiceStub(channel), channel
    await server.stop(None)


@pytest.mark.anyio
async def test_a_request_that_is_refused_unparsed_gets_its_reason_and_nothing_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as (echo, stub, channel):
        assert (await stub.Tokenize(pb.TokenizeRequest(text="abc"))).ids == [3]
        for method in ("Chat", "Tokenize"):
            call = channel.unary_unary(f"/cluster.v1.InferenceService/{method}")
            stream = channel.unary_stream(f"/cluster.v1.InferenceService/{method}")
            for data, code in ((field(3, b"") * MANY, "RESOURCE_EXHAUSTED"), (b"\xff" * 9, "INVALID_ARGUMENT")):
                with pytest.raises(grpc.RpcError) as caught:
                    await (call(data) if method == "Tokenize" else anext(aiter(stream(data))))
                assert caught.value.code().name == code
                assert isinstance(from_rpc_error(caught.value, ""), InvalidRequest)
        assert echo.bodies.held == 0
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


@pytest.mark.anyio
async def test_bytes_are_charged_until_the_call_ends_also_where_it_is_cancelled() -> None:
    size = 3 * FREE_BODY_BYTES
    async with served() as (echo, stub, _):
        first = stub.Generate(pb.GenerateRequest(text="a" * size))
        await _until(lambda: len(echo.held) == 1)
        assert echo.held == [echo.bodies.held]
        assert size - FREE_BODY_BYTES <= echo.bodies.held <= size
        with pytest.raises(grpc.RpcError) as caught:
            await anext(aiter(stub.Generate(pb.GenerateRequest(text="a" * (2 * size)))))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await _until(lambda: echo.bodies.held == 0)
        echo.go_on.set()
        assert [r.prompt.prompt_tokens async for r in stub.Generate(pb.GenerateRequest(text="a" * size))] == [size]
        await _until(lambda: echo.bodies.held == 0)


@pytest.mark.anyio
async def test_of_many_long_requests_at_once_none_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken, or refused with the time to come back."""
    monkeypatch.setattr(message_bounds, "PARSING", ParsingThread(waiting=4))
    chat = pb.TokenizeRequest(messages=[pb.ChatMessage(role="user", content="hi")] * MAX_MESSAGES)
    outcomes: list[float | None] = []

    async with served() as (echo, stub, _):

        async def ask() -> None:
            try:
                await stub.Tokenize(chat)
                outcomes.append(0.0)
            except grpc.RpcError as caught:
                error = from_rpc_error(caught, "")
                assert isinstance(error, Busy), error
                outcomes.append(error.retry_after_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(40):
                tasks.create_task(ask())
        assert echo.bodies.held == 0
    assert len(outcomes) == 40
    assert set(outcomes) == {0.0, RETRY_AFTER_S}


class Members(WorkerServiceServicer, StoreServiceServicer):
    """Counts the content of requests."""

    async def Describe(self, request: Any, context: Any) -> worker.DescribeResponse:
        return worker.DescribeResponse(sequences=len(request.revoked))

    async def LoadStage(self, request: Any, context: Any) -> AsyncIterator[worker.LoadStageResponse]:
        yield worker.LoadStageResponse(total_bytes=len(request.tensors) + len(request.peers))

    async def ListTensors(self, request: Any, context: Any) -> AsyncIterator[store.ListTensorsResponse]:
        yield store.ListTensorsResponse(tensors=[store.TensorState(name=f"{len(request.tensors)}")])


@asynccontextmanager
async def control_port() -> AsyncIterator[aio.Channel]:
    server = control_server(LocalTrust())
    add_WorkerServiceServicer_to_server(Members(), server)
    add_StoreServiceServicer_to_server(Members(), server)
    port = bind(server, LocalTrust(), "127.0.0.1", 0)
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}", options=CONTROL_OPTIONS) as channel:
        yield channel
    await server.stop(None)


MEMBERS_MANY = [
    ("WorkerService/Describe", b"\xc2\x02\x00", MAX_FIELDS),
    ("WorkerService/LoadStage", field(14, b""), MAX_STAGE_FIELDS),
    ("StoreService/ListTensors", field(2, b""), MAX_FIELDS),
    ("StoreService/ReadTensors", field(2, b""), MAX_FIELDS),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "part", "most"), MEMBERS_MANY, ids=[case[0].split("/")[1] for case in MEMBERS_MANY])
async def test_requests_of_members_are_counted_before_they_are_parsed(method: str, part: bytes, most: int) -> None:
    """Without a cluster every program of this machine can send them; 16 MiB of empty messages take 540 MiB."""
    async with control_port() as channel:
        single, streaming = channel.unary_unary(f"/cluster.v1.{method}"), channel.unary_stream(f"/cluster.v1.{method}")
        data = part * (most + 1)
        with pytest.raises(grpc.RpcError) as caught:
            await (single(data) if method.endswith("Describe") else anext(aiter(streaming(data))))
        error = from_rpc_error(caught.value, "")
        assert isinstance(error, TooLarge), error


@pytest.mark.anyio
async def test_a_slice_of_many_tensors_is_loaded() -> None:
    names = [f"model.layers.{i % 64}.mlp.experts.{i}.gate_proj.scales" for i in range(250_000)]
    async with control_port() as channel:
        loading = WorkerServiceStub(channel).LoadStage(worker.LoadStageRequest(tensors=names))
        assert [told.total_bytes async for told in loading] == [len(names)]


async def _until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)
