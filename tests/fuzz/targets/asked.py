"""Fuzz targets of clients' input: protobuf messages, JSON bodies, raw HTTP requests."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import h11
from google.protobuf.message import Message

from cluster.api import request_validation
from cluster.api.grpc.cluster_service import _load_order, _model_entries
from cluster.api.grpc.proto_decoding import chat_params, embed_params, generate_params, tokenize_prompt
from cluster.api.http.app import application
from cluster.api.http.body import parse
from cluster.api.http.ollama_models import ShowForm
from cluster.api.http.openapi import BODIES
from cluster.api.http.tokenize import TokenizeForm
from cluster.api.metrics import Metrics
from cluster.api.requests import Caller
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import Busy
from cluster.model.checkpoint import BUNDLED
from cluster.model.model_shape import read_shape
from cluster.model.tokenizer import load_tokenizer
from cluster.store.store import FoundModel
from cluster.transport.byte_budget import ByteBudget
from cluster.v1 import cluster_pb2, inference_pb2
from fuzz.mutation import spoil_bytes, spoil_json
from fuzz.targets.target import Prepared, Target, prepare_message
from in_process import InProcess
from workerless import WorkerlessCoordinator

CALLER = Caller("fuzz", None)


@functools.cache
def served() -> ModelInfo:
    """Return the bundled small model as a coordinator knows it."""
    folder = BUNDLED / "faq"
    tokenizer = load_tokenizer(folder)
    found, text = FoundModel(folder), InProcess(tokenizer)
    return ModelInfo(read_shape(folder, "faq", None), tokenizer, None, found, text, speculates=True)  # type: ignore[arg-type]


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def awaited(work: Any) -> Any:
    """Return a coroutine's result, on one shared loop."""
    return asyncio.run_coroutine_threadsafe(work, _loop()).result()


SAMPLING = inference_pb2.SamplingOptions(
    temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=7, logprobs=True, logit_bias={3: 1.5}
)
STOP = inference_pb2.StopOptions(max_tokens=9, stop=["stop"], ignore_eos=False)
TEMPLATE = inference_pb2.TemplateOptions(
    tools=[inference_pb2.Tool(name="f", description="d", parameters='{"type":"object"}')],
    tool_choice=inference_pb2.ToolChoice(mode=inference_pb2.TOOL_CHOICE_MODE_AUTO),
    chat_template_kwargs='{"a": 1}',
)
TURNS = [
    inference_pb2.ChatMessage(role="system", content="be kind"),
    inference_pb2.ChatMessage(role="user", content="hello"),
    inference_pb2.ChatMessage(
        role="assistant", tool_calls=[inference_pb2.ToolCall(id="1", name="f", arguments='{"x": 1}')]
    ),
    inference_pb2.ChatMessage(role="tool", content="2", tool_call_id="1"),
]
GRAMMAR = inference_pb2.Grammar(regex="[a-z]+")


def _proto(kind: type[Message], take: Callable[[Any], object], *seeds: Message) -> Callable[[], Prepared]:
    return lambda: prepare_message(kind, take, *seeds)


def _form(form: Any, seeds: tuple[dict[str, Any], ...]) -> Callable[[], Prepared]:
    def run(data: bytes) -> None:
        parsed = parse(data, form)
        if isinstance(parsed, TokenizeForm):
            made = parsed.params()
        elif isinstance(parsed, ShowForm):
            made = parsed.asked()
        else:
            made = parsed.params("id") if hasattr(parsed, "params") else parsed.conversation()
        json.dumps(made, default=asdict, ensure_ascii=False).encode()  # no text that UTF-8 cannot hold

    return lambda: Prepared(run, tuple(json.dumps(seed).encode() for seed in seeds), spoil_json)


CHAT: dict[str, Any] = {
    "model": "faq",
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "logit_bias": {"3": 1.5},
    "stop": ["a", "b"],
    "prediction": {"type": "content", "content": [{"type": "text", "text": "hello"}]},
    "speculate": True,
    "max_tokens": 5,
    "seed": 7,
    "stream": True,
    "stream_options": {"include_usage": True},
}
SEEDS: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": (CHAT,),
    "/v1/completions": (
        {"prompt": "hello", "max_tokens": 5, "logprobs": 2, "temperature": 0.5, "stop": "x", "logit_bias": {"3": 1}},
        {"prompt": [[1, 2], [3]], "n": 2, "response_format": {"type": "regex", "regex": "[a-z]+"}, "echo": False},
    ),
    "/v1/responses": (
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "2"},
            ],
            "instructions": "be kind",
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "reasoning": {"effort": "low"},
            "speculate": False,
            "max_output_tokens": 5,
        },
    ),
    "/v1/messages": (
        {
            "model": "faq",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "be kind"}],
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}]},
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "tool", "name": "f"},
            "thinking": {"type": "enabled", "budget_tokens": 100},
            "stop_sequences": ["x"],
            "speculate": False,
        },
    ),
    "/v1/messages/count_tokens": ({"model": "faq", "messages": [{"role": "user", "content": "hello"}]},),
    "/tokenize": ({"prompt": "hello"}, {"messages": CHAT["messages"], "tools": CHAT["tools"]}),
    "/v1/embeddings": (
        {"input": ["hello", "there"], "encoding_format": "base64", "dimensions": 8},
        {"input": [[1, 2], [3]], "model": "faq", "user": "amy"},
    ),
    "/api/embed": ({"model": "faq", "input": ["hello", "there"], "truncate": False, "dimensions": 8},),
    "/api/embeddings": ({"model": "faq", "prompt": "hello", "keep_alive": "5m"},),
    "/api/chat": (
        {
            "model": "faq",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hello", "images": []},
                {
                    "role": "assistant",
                    "thinking": "so",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "2", "tool_name": "f"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"properties": {"x": {"type": "null, string"}}}},
                }
            ],
            "options": {
                "temperature": 0,
                "num_predict": 5,
                "num_ctx": 64,
                "stop": ["a"],
                "seed": -1,
                "repeat_last_n": 0,
            },
            "format": {"type": "object"},
            "think": "low",
            "keep_alive": "5m",
            "stream": False,
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    "/api/generate": (
        {
            "model": "faq:latest",
            "prompt": "hello",
            "system": "be kind",
            "format": "json",
            "suffix": "",
            "keep_alive": -1,
        },
        {"model": "faq", "prompt": "hello", "raw": True, "options": {"num_predict": -2, "mirostat": 1}, "think": True},
    ),
    "/api/show": ({"model": "faq", "verbose": True}, {"name": "faq"}),
}
PAGE_SEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/api/answer", CHAT),
    ("/api/session", {"key": "mpk_0123456789ab_x"}),
    ("/api/plans", {"models": [{"model": "faq", "name": "a", "pinned": True, "priority": 1}, {"model": "faq-draft"}]}),
    ("/api/plan", {"model": "faq", "layers": "0-1,2-3", "max_context": 64, "quantize": 4, "acceptance": 0.5}),
    ("/api/load", {"model": "faq", "workers": 2, "objective": "throughput", "route": "relay", "kv_bits": 8}),
    ("/api/unload", {}),
    ("/api/unload", {"name": "small"}),
)


class _Nobody(WorkerlessCoordinator):
    """A coordinator that serves a model, and takes nothing."""

    def served_model(self, name: str, adapter: str = "") -> ModelInfo:
        return served()

    def __getattr__(self, name: str) -> Any:
        raise Busy(f"nothing is taken here: {name}")


class _Desk:
    """Every request that passes validation is refused."""

    key_usage = None
    coordinator = _Nobody()
    metrics = Metrics()
    bodies = ByteBudget()
    strict = False
    on_demand = None

    async def submit(self, request: object, model_info: object) -> object:
        raise Busy("nothing is taken here")


def http_requests() -> Prepared:
    """Send raw requests through the server's parser, middleware, routes, bodies and validation: none ends with 500."""
    served()
    app = application(_Desk())  # type: ignore[arg-type]

    def run(data: bytes) -> None:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data)
        request = connection.next_event()
        if not isinstance(request, h11.Request):
            return
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
        status = awaited(_asked(app, request, body if isinstance(event, h11.EndOfMessage) else None))
        assert status != 500, "the request met a fault of ours"

    seeds = [*PAGE_SEEDS, *((path, seed) for path, seeds in SEEDS.items() for seed in seeds)]
    bodies = [(path, json.dumps(seed)) for path, seed in seeds]
    head = (
        "host: localhost:8080\r\norigin: http://localhost:8080\r\nauthorization: Bearer x\r\nx-request-timeout: 3\r\n"
    )
    posts = [f"POST {p} HTTP/1.1\r\n{head}content-length: {len(b)}\r\n\r\n{b}" for p, b in bodies]
    gets = [
        f"GET {p} HTTP/1.1\r\n{head}x-request-id: a\r\n\r\n"
        for p in (
            "/v1/models",
            "/v1/models/faq",
            "/live",
            "/metrics",
            "/page/app.js",
            "/api/session",
            "/api/events",
            "/api/tags",
            "/api/ps",
        )
    ]
    return Prepared(run, tuple(one.encode() for one in (*posts, *gets)), _spoil_http, (h11.RemoteProtocolError,))


def _spoil_http(data: bytes, rng: Any, others: Any) -> bytes:
    """Head or body; the length is put right, or nothing would get beyond it."""
    head, _, body = data.partition(b"\r\n\r\n")
    if rng.random() < 0.5:
        head = spoil_bytes(head, rng, [])
    elif body:
        body = spoil_json(body, rng, [])
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
    return b"\r\n".join((*lines, b"content-length: %d" % len(body))) + b"\r\n\r\n" + body


async def _asked(app: Any, request: h11.Request, body: bytes | None) -> int:
    path, _, query = request.target.partition(b"?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "server": ("127.0.0.1", 8080),
        "client": ("127.0.0.1", 5), "scheme": "http", "method": request.method.decode("ascii"), "root_path": "",
        "path": path.decode("ascii", "replace"), "raw_path": path, "query_string": query,
        "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
    }  # fmt: skip
    got = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return got.pop() if got else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0] if statuses else 0


GENERATE = inference_pb2.GenerateRequest(request_id="r", text="hello", sampling=SAMPLING, stop=STOP, grammar=GRAMMAR)
GENERATE_IDS = inference_pb2.GenerateRequest(
    tokens=inference_pb2.TokenIds(ids=[1, 2, 3]), samples=2, speculate=False, adapter="legal", resumable=True
)
GENERATES = (GENERATE, GENERATE_IDS)
CHAT_PROTO = inference_pb2.ChatRequest(messages=TURNS, sampling=SAMPLING, stop=STOP, template=TEMPLATE)
CHAT_PLAIN = inference_pb2.ChatRequest(
    messages=TURNS[:2], sampling=SAMPLING, stop=STOP, grammar=GRAMMAR, prediction="hello", priority=3, resumable=True
)
EMBED = inference_pb2.EmbedRequest(
    model="faq",
    inputs=[
        inference_pb2.EmbedInput(text="hello"),
        inference_pb2.EmbedInput(tokens=inference_pb2.TokenIds(ids=[1, 2, 3])),
    ],
    dimensions=8,
)
TOKENIZE = (inference_pb2.TokenizeRequest(text="hello"), inference_pb2.TokenizeRequest(messages=TURNS[:2]))
LOAD = cluster_pb2.LoadModelRequest(
    model="faq",
    workers=2,
    layers="0-1,2-3",
    max_context=64,
    max_step_ms=5.0,
    kv_bits=8,
    quantize=4,
    prefill_chunk=16,
    acceptance=0.5,
    adapters=[cluster_pb2.AdapterFolder(name="legal", folder="/legal")],
    speculation=cluster_pb2.SPECULATION_NGRAM,
    inexact=True,
)
PLAN = cluster_pb2.PlanRequest(model="faq", workers=2, layers="0-1,2-3")
PLANS = cluster_pb2.PlanModelsRequest(
    models=[
        cluster_pb2.ModelToPlan(name="large", order=PLAN, pinned=True, priority=2),
        cluster_pb2.ModelToPlan(order=cluster_pb2.PlanRequest(model="org/small@main")),
    ]
)


async def _generated(message: inference_pb2.GenerateRequest) -> object:
    return await request_validation.generate_request(generate_params(message), message.ByteSize(), served(), CALLER)


async def _chatted(message: inference_pb2.ChatRequest) -> object:
    return await request_validation.chat_request(chat_params(message), message.ByteSize(), served(), CALLER)


async def _embedded(message: inference_pb2.EmbedRequest) -> object:
    size, model = message.ByteSize(), served()
    return [await request_validation.generate_request(one, size, model, CALLER) for one in embed_params(message)]


async def _tokenized(message: inference_pb2.TokenizeRequest) -> object:
    return await request_validation.list_tokens(tokenize_prompt(message), message.ByteSize(), served())


def _order(message: cluster_pb2.LoadModelRequest | cluster_pb2.PlanRequest) -> object:
    return _load_order(message, LoadOrder("first"))


def _models(message: cluster_pb2.PlanModelsRequest) -> object:
    return _model_entries(message.models, LoadOrder("first"))


TARGETS = (
    Target("generate", 40, _proto(inference_pb2.GenerateRequest, lambda m: awaited(_generated(m)), *GENERATES)),
    Target("chat", 20, _proto(inference_pb2.ChatRequest, lambda m: awaited(_chatted(m)), CHAT_PLAIN, CHAT_PROTO)),
    Target("embed", 30, _proto(inference_pb2.EmbedRequest, lambda m: awaited(_embedded(m)), EMBED)),
    Target("tokenize", 20, _proto(inference_pb2.TokenizeRequest, lambda m: awaited(_tokenized(m)), *TOKENIZE)),
    Target("load", 60, _proto(cluster_pb2.LoadModelRequest, _order, LOAD)),
    Target("plan", 30, _proto(cluster_pb2.PlanRequest, _order, PLAN)),
    Target("plan-models", 30, _proto(cluster_pb2.PlanModelsRequest, _models, PLANS)),
    Target("http", 30, http_requests),
    *(Target(f"form{path.replace('/', '-')}", 60, _form(form, SEEDS[path])) for path, form, _ in BODIES),
)
