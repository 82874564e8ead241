"""Embeddings over HTTP, from a coordinator whose states are known: their forms, their bounds and their errors."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.api import embeddings
from cluster.api.embeddings import shorten
from cluster.api.http.app import application
from cluster.api.http.body import parse
from cluster.api.http.embeddings_form import EmbeddingsForm, OllamaEmbedForm
from cluster.api.http.model_names import ModelNames
from cluster.api.limits import CONCURRENT_EMBEDDINGS, MAX_EMBEDDED
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.model_host import HeldModel
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import Busy, InvalidRequest, StageFailed
from cluster.core.request import Accepted, FinishEvent, FinishReason, Request, TokenEvent, Usage
from cluster.model.sentence_embedding import SentenceEmbedding
from fuzz.targets.asked import served
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio

STATE = (3.0, 4.0, 0.0, 1e-9)


class States(WorkerlessCoordinator):
    """A coordinator whose hidden states are all ``state``; it counts the requests that run at the same time."""

    def __init__(self) -> None:
        self.model = replace(served(), embedding=SentenceEmbedding(normalized=True))
        self.state = struct.pack("<4f", *STATE)
        self.requests: list[Request] = []
        self.live = self.most = 0
        self.refuse_after = 10**9

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        return self.model

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        if len(self.requests) >= self.refuse_after:
            raise Busy("the queue is full")
        self.requests.append(request)
        self.live += 1
        self.most = max(self.most, self.live)
        batch = EventBatch()
        answer = AnswerQueue(batch, self._end, samples=1)
        answer.put(Accepted())
        batch.deliver()
        asyncio.get_running_loop().call_later(0.001, self._answer, answer, batch)
        return answer

    def _answer(self, answer: AnswerQueue, batch: EventBatch) -> None:
        self._end()
        answer.put(TokenEvent(0, 5, "", state=self.state))
        answer.put(FinishEvent(FinishReason.LENGTH, "", Usage(1, 1), 1.0, 0.0))
        batch.deliver()

    def _end(self, answer: AnswerQueue | None = None) -> None:
        self.live -= 1


@pytest.fixture
def states() -> States:
    return States()


@pytest.fixture
async def client(states: States) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(RequestService(states, Metrics())))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        yield client


def test_each_kind_of_input_is_a_request_of_its_own() -> None:
    def prompts(given: Any) -> list[Any]:
        asked = parse(json.dumps({"input": given}).encode(), EmbeddingsForm).params("id")
        assert all(
            (one.embeds, one.max_tokens, one.ignore_eos, one.speculate) == (True, 1, True, False) for one in asked
        )
        assert len({one.request_id for one in asked}) == len(asked)
        return [one.prompt for one in asked]

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], "b"]) == [[1], "b"]


@pytest.mark.parametrize(
    ("more", "field", "word"),
    [
        ({"input": 5}, "input", "input: "),
        ({"input": ["a"] * (MAX_EMBEDDED + 1)}, "input", f"at most {MAX_EMBEDDED}"),
        ({"input": ["a", -1]}, "input[1]", "input[1]: "),
        ({"dimensions": 0}, "dimensions", "greater"),
        ({"encoding_format": "int8"}, "encoding_format", "base64"),
        ({"made_up": 1}, "made_up", "not a parameter"),
    ],
)
def test_a_refusal_names_its_field(more: dict[str, Any], field: str, word: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(json.dumps({"input": "a", **more}).encode(), EmbeddingsForm)
    assert refused.value.field == field
    assert word in refused.value.sentence


async def test_numbers_and_base64_tell_the_same_vector(client: httpx.AsyncClient, states: States) -> None:
    reply = (await client.post("/v1/embeddings", json={"input": ["a", "b c"]})).json()
    assert [one["index"] for one in reply["data"]] == [0, 1]
    assert reply["data"][0]["embedding"] == pytest.approx([0.6, 0.8, 0, 2e-10])
    assert reply["usage"]["prompt_tokens"] == sum(len(r.prompt) for r in states.requests)
    packed = (await client.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"})).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<4f", raw) == tuple(struct.unpack("<4f", struct.pack("<4f", *reply["data"][0]["embedding"])))
    ollama = (await client.post("/api/embed", json={"model": "faq", "input": "a"})).json()
    single = (await client.post("/api/embeddings", json={"model": "faq:latest", "prompt": "a"})).json()
    assert ollama["embeddings"] == [single["embedding"]] == [reply["data"][0]["embedding"]]
    assert ollama["total_duration"] > ollama["load_duration"] >= 0


async def test_few_texts_are_computed_at_a_time_and_all_are_answered_in_order(
    client: httpx.AsyncClient, states: States
) -> None:
    reply = await client.post("/v1/embeddings", json={"input": ["a"] * 100})
    assert [one["index"] for one in reply.json()["data"]] == list(range(100))
    assert 1 < states.most <= CONCURRENT_EMBEDDINGS
    assert all(r.embeds and r.sampling.temperature == 0 for r in states.requests)
    assert states.live == 0


async def test_the_first_error_ends_all(client: httpx.AsyncClient, states: States) -> None:
    states.refuse_after = 40
    reply = await client.post("/v1/embeddings", json={"input": ["a"] * 100})
    assert (reply.status_code, "queue is full" in reply.text) == (429, True)
    assert len(states.requests) == 40
    states.refuse_after = 10**9
    empty = await client.post("/v1/embeddings", json={"input": []})
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "input")
    long = await client.post("/api/embed", json={"model": "faq", "input": ["a", "hop " * 5000]})
    assert long.status_code == 400
    assert "context" in long.json()["error"]


async def test_a_state_that_is_missing_or_not_finite_is_an_error(client: httpx.AsyncClient, states: States) -> None:
    for state, word in ((b"", "no hidden state"), (struct.pack("<2f", 1, float("inf")), "not finite")):
        states.state = state
        reply = await client.post("/v1/embeddings", json={"input": "a"})
        assert (reply.status_code, word in reply.text) == (500, True)


async def test_the_vectors_of_one_request_are_bounded(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "MAX_COLLECTED_BYTES", 1000)
    assert (await client.post("/v1/embeddings", json={"input": ["a"] * 2})).status_code == 200
    reply = await client.post("/v1/embeddings", json={"input": ["a"] * 50})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")


async def test_a_fallback_makes_no_embeddings(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of two models cannot be compared."""

    @asynccontextmanager
    async def hold(self: ModelNames, requested: str | None, wait_s: float | None = None) -> AsyncIterator[HeldModel]:
        yield HeldModel(self.resolve(requested), fallback="small")

    monkeypatch.setattr(ModelNames, "hold", hold)
    reply = await client.post("/v1/embeddings", json={"input": "a"})
    assert (reply.status_code, "fallback small" in reply.text) == (503, True)


async def test_a_model_that_makes_none_is_not_asked(client: httpx.AsyncClient, states: States) -> None:
    states.model = served()
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/api/embed", {"model": "faq", "input": "a"})):
        reply = await client.post(path, json=body)
        assert (reply.status_code, "modules.json" in reply.text) == (400, True)
    assert states.requests == []


def test_shorter_vectors_have_length_one_too() -> None:
    assert shorten(STATE, 1, normalized=True) == (1.0,)
    assert shorten(STATE, 2, normalized=False) == (3.0, 4.0)
    assert shorten((0.0, 0.0), None, normalized=True) == (0.0, 0.0)
    with pytest.raises(InvalidRequest, match="embeddings have 4"):
        shorten(STATE, 5, normalized=True)
    with pytest.raises(StageFailed, match="not finite"):
        shorten((float("nan"),), None, normalized=True)


def test_no_text_has_no_embedding() -> None:
    assert parse(b'{"model": "faq", "input": []}', OllamaEmbedForm).params("id") == []
