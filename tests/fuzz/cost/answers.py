"""The cost target of answers: what a client can make the coordinator hold, encode and send.

An input is a JSON object: ``to``, a route or a gRPC method; ``body``, the request; ``says``, what the model repeats;
``tokens``, how many it says in all. ``top`` alternatives come with each token. ``whole``: calls are not streamed, but
read in the sandbox, whose answer is the text of the call as arguments.

A reader is always as far behind as it may be. The answer that another coordinator began, ``Resume``, comes as a whole.
The engine loop's steps run on the event loop here, so that the longest of them counts as a stretch of it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Final

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from starlette.types import ASGIApp

from answering import Generation
from cluster.api.grpc.inference_service import InferenceServicer
from cluster.api.http.app import application
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.api.sampling_validation import stop_strings
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import MacpipeError
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import KIB, MAX_READ_CALLS, MAX_SAMPLES, MAX_TOP_LOGPROBS, MAX_UNREAD_EVENTS
from cluster.core.request import Parsing, Request, SamplingParams, Tool, ToolCall, TopLogprob
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.security.credentials import LocalTrust
from cluster.v1 import inference_pb2 as pb
from fuzz.cost.http import scope_of
from fuzz.cost.recipe import Recipe
from fuzz.cost.stand_in import Aborted, Context, Coordinator, model_folder, served
from fuzz.cost.target import KEPT_OUT, TAKEN, CostTarget, Entry
from in_process import InProcess

LIMIT: Final = 64 * KIB
MAX_TOKENS: Final = 8192
"""Tokens of all samples of one input: with 20 alternatives each they take 40 MiB, which an answer may."""
MAX_LATE_TOKENS: Final = 32 * KIB
"""Tokens of an answer that comes as a whole."""
TOKEN_S: Final = 250e-6
"""Processor time that each token may take: far less than any model needs for it."""
TOOLS: Final = (Tool("f", "", '{"type":"object"}'),)


class _Calls(InProcess):
    """Reads any text as calls: each line is the arguments of one."""

    async def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        await asyncio.sleep(0)
        return tuple(ToolCall("", tools[0].name, line) for line in body.split("\n", MAX_READ_CALLS - 1))


class _WholeCalls:
    """A tokenizer whose calls are not streamed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def parser(self, parsing: Parsing, identity: str = "") -> Any:
        parser = self._tokenizer.parser(parsing, identity)
        parser._markers = copy(parser._markers)
        parser._markers.format = ""
        return parser


@dataclass(slots=True)
class _Answers(Coordinator):
    """A coordinator whose model repeats a text."""

    model: ModelInfo
    says: Sequence[int] = (1,)
    tokens: int = 1
    top: tuple[TopLogprob, ...] = ()
    late: Request | None = None
    speaking: set[asyncio.Task[None]] = field(default_factory=set)

    def served_model(self, name: str, adapter: str = "") -> ModelInfo:
        return self.model

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        generation = Generation(request, model_info.tokenizer.decoder)
        self._spawn(self._speak(generation, request))
        return generation.answer

    def resume(self, request_id: str, known: tuple[KnownTokens, ...], client: str) -> tuple[Request, AnswerQueue]:
        assert self.late
        generation = Generation(self.late, self.model.tokenizer.decoder)
        self._spawn(self._repeat(generation, self.late.samples))
        return self.late, generation.answer

    async def abort(self, request_id: str) -> None: ...

    def _spawn(self, speaking: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(speaking)
        self.speaking.add(task)
        task.add_done_callback(self.speaking.discard)

    async def _speak(self, generation: Generation, request: Request) -> None:
        await _begin(generation)
        ids = itertools.cycle(self.says)
        for number in range(max(1, min(request.max_tokens, self.tokens // request.samples))):
            generation.say(next(ids), self.top if request.sampling.logprobs else ())
            if number % MAX_UNREAD_EVENTS == MAX_UNREAD_EVENTS - 1:
                generation.deliver()
                while generation.unread:
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
        generation.end()
        generation.deliver()

    async def _repeat(self, generation: Generation, samples: int) -> None:
        each = list(itertools.islice(itertools.cycle(self.says), self.tokens // samples))
        await _begin(generation, [each] * samples)
        generation.end()
        generation.deliver()


async def _begin(generation: Generation, known: Sequence[Sequence[int]] = ()) -> None:
    for _ in generation.begin(known):
        await asyncio.sleep(0)
    generation.deliver()


def _entry() -> Entry:
    known = served()
    streamed = replace(known, text=_Calls(known.tokenizer))
    whole = replace(streamed, tokenizer=_WholeCalls(load_tokenizer(model_folder())))  # type: ignore[arg-type]
    coordinator = _Answers(streamed)
    service = RequestService(coordinator, Metrics())  # type: ignore[arg-type]
    http, grpc = application(service), InferenceServicer(service, LocalTrust())

    prepared: list[tuple[bytes, str, dict[str, Any]]] = []

    async def prepare(data: bytes) -> bool:
        """Read an input, and make the coordinator answer as it says; this is not part of the cost."""
        try:
            asked = json.loads(data)
            to, body, says = str(asked["to"]), dict(asked["body"]), known.tokenizer.encode(str(asked["says"])[:LIMIT])
            prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
            tokens = min(int(asked["tokens"]), MAX_LATE_TOKENS if to == "Resume" else MAX_TOKENS // max(1, prompts))
            top = range(min(int(asked.get("top", 0)), MAX_TOP_LOGPROBS))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MacpipeError):
            return False
        coordinator.model = whole if asked.get("whole") else streamed  # all copies of an input are alike
        coordinator.says, coordinator.tokens = says or (1,), max(1, tokens)
        coordinator.top = tuple(TopLogprob(i, -float(i)) for i in top)
        prepared[:] = [(data, to, body)]
        return True

    async def take(data: bytes) -> str:
        if (not prepared or prepared[0][0] != data) and not await prepare(data):
            return KEPT_OUT
        _, to, body = prepared[0]
        if to.startswith("/"):
            return await _post(http, to, json.dumps(body).encode())
        try:
            return await _call(grpc, coordinator, to, body)
        except (ParseError, TypeError, ValueError):
            return KEPT_OUT

    return Entry(take, lets_in=prepare)


async def _post(http: ASGIApp, path: str, body: bytes) -> str:
    """Post a request, and read the answer as fast as it comes; it is not kept."""
    told, connected = [0], asyncio.Event()
    sent = iter((body,))

    async def receive() -> dict[str, Any]:
        for part in sent:
            return {"type": "http.request", "body": part, "more_body": False}
        await connected.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        told[0] = message.get("status", told[0])

    await http(scope_of(path, len(body)), receive, send)
    return TAKEN if told[0] == 200 else f"HTTP {told[0]}"


async def _call(servicer: InferenceServicer, coordinator: _Answers, method: str, body: dict[str, Any]) -> str:
    """Call a method as gRPC does, which encodes each reply, and returns to the event loop as it sends it."""
    context: Any = Context()
    match method:
        case "Generate":
            replies: AsyncIterator[Message] = servicer.Generate(ParseDict(body, pb.GenerateRequest()), context)
        case "Chat":
            replies = servicer.Chat(ParseDict(body, pb.ChatRequest()), context)
        case _:
            parsing = Parsing(TOOLS) if body.get("tools") else None
            samples = max(1, min(int(body.get("samples", 1)), MAX_SAMPLES))
            stop = stop_strings(body.get("stop", ()))
            coordinator.late = Request("r", (1,), SamplingParams(), 10**6, stop, samples=samples, parsing=parsing)
            replies = servicer.Resume(pb.ResumeRequest(request_id="r"), context)
    try:
        async for reply in replies:
            reply.SerializeToString()
            await asyncio.sleep(0)
    except Aborted as e:
        return str(e.code.name)
    return TAKEN


def _case(to: str, body: dict[str, Any], says: Recipe, tokens: int = MAX_TOKENS, **more: object) -> Recipe:
    head = json.dumps({"to": to, "body": body, "tokens": tokens, **more})
    return ["cat", head[:-1] + ', "says": "', says, '"}']


def _seeds() -> Mapping[str, Recipe]:
    messages = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat = {"messages": messages, "n": 32, "max_tokens": MAX_TOKENS}
    called = {"messages": messages, "max_tokens": MAX_TOKENS, "tools": [tool]}
    anthropic = {**called, "model": "faq", "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    length = {"maxTokens": MAX_TOKENS}
    generated = {"text": "hi", "samples": 32, "stop": length}
    response = {"input": "hi", "max_output_tokens": MAX_TOKENS}
    calling = response | {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]}
    grpc_called = {"messages": messages, "template": {"tools": [{"name": "f"}]}, "stop": length}
    completion = {"prompt": ["a"] * 8, "n": 4, "max_tokens": MAX_TOKENS}
    logprobs = {"logprobs": True, "top_logprobs": 20}
    listed = {"include": ["message.output_text.logprobs"], "top_logprobs": 20}
    stop = ["ab" * n + "!" for n in range(113, 129)]
    streamed = {"stream": True}
    start = '<tool_call>{\\"name\\": \\"f\\", \\"arguments\\": '
    lists: Recipe = ["cat", start, '{\\"a\\":[', ["rep", 3000, "[],"], "1]}}</tool_call>"]
    texts: Recipe = ["cat", start, '{\\"a\\":\\"', ["rep", 3000, "word "], '\\"}}</tool_call>']
    long: Recipe = ["cat", "<tool_call>", ["rep", 8000, "word "], "</tool_call>"]
    lines: Recipe = ["cat", "<tool_call>", ["rep", 255, "a line\\n"], "</tool_call>"]
    small: Recipe = ["cat", start, "{}}</tool_call>"]
    open_call: Recipe = ["cat", "<tool_call>", ["rep", 3000, "word "]]
    made = {
        "words": _case("/v1/chat/completions", chat, "many words "),
        "words streamed": _case("/v1/chat/completions", chat | streamed, "many words "),
        "words of a long answer": _case("/v1/chat/completions", chat | {"n": 1} | streamed, "many words "),
        "log-probabilities": _case("/v1/chat/completions", chat | logprobs, "a", top=20),
        "log-probabilities streamed": _case("/v1/chat/completions", chat | logprobs | streamed, "a", top=20),
        "completions": _case("/v1/completions", completion, "many words "),
        "completions streamed": _case("/v1/completions", completion | streamed, "many words "),
        "columns": _case("/v1/completions", completion | {"logprobs": 20}, "a", top=20),
        "columns streamed": _case("/v1/completions", completion | {"logprobs": 20} | streamed, "a", top=20),
        "response": _case("/v1/responses", response | listed, "a", top=20),
        "response streamed": _case("/v1/responses", response | listed | streamed, "a", top=20),
        "response of words": _case("/v1/responses", response | streamed, "many words "),
        "stop strings": _case("/v1/chat/completions", chat | {"stop": stop[:4]}, ["rep", 100, "ab"]),
        "stop strings of gRPC": _case(
            "Generate", generated | {"stop": {**length, "strings": stop}}, ["rep", 100, "ab"]
        ),
        "gRPC": _case("Generate", generated | {"sampling": {"logprobs": True, "topLogprobs": 20}}, "a", top=20),
        "incomplete characters": _case("/v1/chat/completions", chat | streamed, "\\ufffd"),
        "blanks": _case("/v1/chat/completions", called | streamed, ["rep", 500, " "]),
        "late": _case("Resume", {}, "many words ", MAX_LATE_TOKENS),
        "late samples": _case("Resume", {"samples": 32}, "many words ", MAX_LATE_TOKENS),
        "late calls": _case("Resume", {"tools": True}, small, MAX_LATE_TOKENS),
        "late blanks": _case("Resume", {"tools": True}, ["rep", 500, " "], MAX_LATE_TOKENS),
    }
    for name, says in {"lists": lists, "texts": texts, "small": small, "open": open_call}.items():
        for way in ({}, streamed):
            kind = f"call of {name}{' streamed' if way else ''}"
            made[kind] = _case("/v1/chat/completions", called | way, says)
            made[f"{kind} of messages"] = _case("/v1/messages", anthropic | way, says)
            made[f"{kind} of responses"] = _case("/v1/responses", calling | way, says)
    for name, says in {"whole": long, "many": lines}.items():
        for way in ({}, streamed):
            kind = f"{name} calls{' streamed' if way else ''}"
            made[kind] = _case("/v1/chat/completions", called | way, says, whole=True)
            made[f"{kind} of messages"] = _case("/v1/messages", anthropic | way, says, whole=True)
        made[f"{name} calls of gRPC"] = _case("Chat", grpc_called, says, whole=True)
    return made


ATOMS: tuple[Recipe, ...] = (
    *("many words ", "a", " ", "[],", "<tool_call>", "</tool_call>", "\\n"),
    ["rep", 500, " "],
    ["rep", 500, "[],"],
)
TARGETS = (
    CostTarget(
        "answers",
        "8,192 tokens; 32,768 of a resumed answer",
        LIMIT,
        2,
        _entry,
        _seeds,
        ATOMS,
        cpu_s=TOKEN_S * MAX_TOKENS,
    ),
)
