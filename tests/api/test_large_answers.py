"""Large answers: the event loop goes on while they are encoded and written, and what they hold is bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest

from cluster.api.http import answer_assembly, messages, responses_stream
from cluster.api.http.answer_assembly import AnswerPart, GeneratedCall
from cluster.api.http.app import application
from cluster.api.http.json_response import WRITE_CHARS, Encoded, LongJson, compact, encode_text, encoded_list
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest
from cluster.core.limits import KIB, MAX_INTAKE_BYTES, MIB
from cluster.core.request import Accepted, FinishEvent, FinishReason, Request, TokenEvent, TopLogprob, Usage
from fuzz.targets.asked import served
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio

TOKENS = 100
TOP = tuple(TopLogprob(i, -float(i)) for i in range(20))
HI = [{"role": "user", "content": "hi"}]
ROUTES = {
    "/v1/chat/completions": {"messages": HI, "logprobs": True, "top_logprobs": 20, "n": 2},
    "/v1/completions": {"prompt": ["a", "b"], "logprobs": 20, "n": 2},
    "/v1/responses": {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 20},
}


class Texts:
    """A tokenizer that counts how many token texts were asked for in one turn of the event loop."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.turn = self.most = self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def token_text(self, token: int) -> str:
        self.turn += 1
        self.most = max(self.most, self.turn)
        return f"t{token}"

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += 1
        return "prompt "


class ManyTokens(WorkerlessCoordinator):
    """A coordinator whose answers are complete at once, with the log-probabilities of 20 tokens for each of theirs."""

    def __init__(self) -> None:
        model = served()
        self.texts = Texts(model.tokenizer)
        self.model = replace(model, tokenizer=self.texts)  # type: ignore[arg-type]

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        return self.model

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        batch = EventBatch()
        answer = AnswerQueue(batch, samples=request.samples)
        answer.put(Accepted())
        for sample in range(request.samples):
            for i in range(TOKENS):
                answer.put(TokenEvent(i, 5, "ab", sample=sample, logprob=-1.0, top=TOP))
            answer.put(FinishEvent(FinishReason.STOP, "", Usage(1, TOKENS), 1.0, 1.0, sample=sample))
        batch.deliver()
        return answer


@pytest.fixture
def coordinator() -> ManyTokens:
    return ManyTokens()


@pytest.fixture
def service(coordinator: ManyTokens) -> RequestService:
    return RequestService(coordinator, Metrics())  # type: ignore[arg-type]


@pytest.fixture
async def ask(service: RequestService) -> AsyncIterator[Callable[..., Any]]:
    transport = httpx.ASGITransport(application(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:

        async def post(path: str, status: int = 200, **more: object) -> Any:
            answer = await client.post(path, json=ROUTES[path] | more)
            assert answer.status_code == status
            return answer.json()

        yield post


async def count_turns(texts: Texts) -> None:
    while True:
        texts.turn = 0
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", ROUTES)
async def test_the_event_loop_runs_between_an_answers_tokens(
    path: str, coordinator: ManyTokens, ask: Callable[..., Any]
) -> None:
    turns = asyncio.create_task(count_turns(coordinator.texts))
    await ask(path)
    turns.cancel()
    assert 1 <= coordinator.texts.most <= 2 * (len(TOP) + 2)


async def test_all_of_them_arrive(ask: Callable[..., Any]) -> None:
    chat = (await ask("/v1/chat/completions"))["choices"][1]["logprobs"]
    first = {"token": "t5", "logprob": -1.0, "bytes": [116, 53]}
    assert len(chat["content"]) == TOKENS
    assert chat["content"][-1].items() >= first.items()
    assert [top["token"] for top in chat["content"][-1]["top_logprobs"]] == [f"t{i}" for i in range(20)]
    columns = (await ask("/v1/completions"))["choices"][3]["logprobs"]
    assert columns["tokens"] == ["t5"] * TOKENS
    assert columns["token_logprobs"] == [-1.0] * TOKENS
    assert columns["text_offset"] == [2 * i for i in range(TOKENS)]
    assert [len(tops) for tops in columns["top_logprobs"]] == [20] * TOKENS
    (message,) = (await ask("/v1/responses"))["output"]
    assert message["content"][0]["logprobs"] == chat["content"]


async def test_an_echoed_prompt_is_decoded_once_for_all_its_samples(
    coordinator: ManyTokens, ask: Callable[..., Any]
) -> None:
    answer = await ask("/v1/completions", echo=True, logprobs=None, n=8)
    assert [choice["text"][:9] for choice in answer["choices"]] == ["prompt ab"] * 16
    assert coordinator.texts.decoded == 2


@pytest.mark.parametrize("path", ROUTES)
async def test_an_answer_that_is_too_large_to_collect_names_what_to_change(
    path: str, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_assembly, "MAX_COLLECTED_BYTES", TOKENS * 1000)
    error = (await ask(path, status=400))["error"]
    assert "stream it, or ask for fewer samples, tokens or alternatives" in error["message"]
    assert error["param"] == "max_tokens"


@pytest.mark.parametrize("path", ROUTES)
async def test_a_large_answer_waits_for_what_other_clients_hold(
    path: str, service: RequestService, ask: Callable[..., Any]
) -> None:
    others = {f"client {i}": MAX_INTAKE_BYTES >> i for i in range(1, 14)}  # each the half of what is left
    for client, count in others.items():
        service.bodies.take(client, count)
    assert (await ask(path, status=429))["error"]["code"] == "too_many_bytes"
    for client, count in others.items():
        service.bodies.give_back(client, count)
    await ask(path)
    assert service.bodies.held == 0


async def test_a_long_answer_is_written_in_parts() -> None:
    parts: list[bytes] = []

    async def send(message: Any) -> None:
        parts.append(message.get("body", b""))

    entries = [compact({"token": "\u00e9", "logprob": -float(i)}) for i in range(20_000)]
    response = LongJson({"text": "x" * MIB, "entries": encoded_list(entries)})
    await response({"type": "http"}, AsyncMock(), send)
    assert max(map(len, parts)) <= 2 * WRITE_CHARS + KIB
    assert len(parts) > 6
    assert len(json.loads(b"".join(parts))["entries"]) == len(entries)
    assert "content-length" not in response.headers


@pytest.mark.parametrize("text", ["short", 'a"\n\u00e9\U0001f600' * WRITE_CHARS])
async def test_a_text_of_any_length_is_encoded_whole(text: str) -> None:
    assert json.loads(compact([await encode_text(text)])) == [text]


def test_encoded_parts_keep_their_places() -> None:
    data = {"a": Encoded("[1,2]"), "b": ["x", Encoded('{"c":"\\""}')], "d": Encoded("null")}
    assert compact(data) == '{"a":[1,2],"b":["x",{"c":"\\""}],"d":null}'
    with pytest.raises(TypeError, match="set"):
        compact({1: {2}})


async def test_a_streamed_response_keeps_a_bounded_number_of_log_probabilities(
    service: RequestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last events repeat them all."""
    body = {**ROUTES["/v1/responses"], "stream": True}
    transport = httpx.ASGITransport(application(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        whole = await client.post("/v1/responses", json=body)
        monkeypatch.setattr(responses_stream, "MAX_REPEATED_BYTES", 20 * KIB)
        refused = await client.post("/v1/responses", json=body)
    assert "event: response.completed" in whole.text
    assert "event: response.failed" in refused.text
    assert "ask for fewer tokens or alternatives" in refused.text
    assert len(refused.text) < len(whole.text) / 4
    assert service.bodies.held == 0


async def test_the_event_loop_runs_before_each_event_that_is_there_already() -> None:
    batch = EventBatch()
    answer = AnswerQueue(batch)
    for i in range(TOKENS):
        answer.put(TokenEvent(i, 5, "ab"))
    answer.put(FinishEvent(FinishReason.STOP, "", Usage(1, TOKENS), 1.0, 1.0))
    batch.deliver()
    turns: list[int] = []

    async def count() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    assert len([event async for event in answer]) == TOKENS + 1
    counting.cancel()
    assert len(turns) > TOKENS


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ('{"a": [1, 2], "b": "\\u00e9"}', {"a": [1, 2], "b": "\u00e9"}),
        ('{"a": 1, "b": "cut', {"a": 1}),
        ('{"a": NaN}', {}),
        ("[1]", {}),
        ("", {}),
        ('{"a": "' + "x" * 20_000 + '"}', {"a": "x" * 20_000}),
    ],
)
async def test_a_call_s_arguments_are_an_object(arguments: str, known: object) -> None:
    block = await messages.encode_block(AnswerPart(call=GeneratedCall("call_1", "f", arguments)))
    assert json.loads(compact(block)) == {"type": "tool_use", "id": "call_1", "name": "f", "input": known}


async def test_arguments_of_too_many_elements_are_refused() -> None:
    call = GeneratedCall("call_1", "f", '{"a":[' + "[]," * 70_000 + "1]}")
    with pytest.raises(InvalidRequest, match="as one object, because the JSON has too many elements") as refused:
        await messages.encode_block(AnswerPart(call=call))
    assert refused.value.field == "stream"
