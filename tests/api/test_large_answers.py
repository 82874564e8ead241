"""An answer's log-probabilities are hundreds of thousands of objects: the event loop goes on while they are encoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.api.http.app import application
from cluster.api.http.json_response import Encoded, compact
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.request import Accepted, FinishEvent, FinishReason, Request, TokenEvent, TopLogprob, Usage
from fuzz.targets.asked import served

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


class ManyTokens:
    """A coordinator whose answers are complete at once, with the log-probabilities of 20 tokens for each of theirs."""

    def __init__(self) -> None:
        model = served()
        self.texts = Texts(model.tokenizer)
        self.model = replace(model, tokenizer=self.texts)  # type: ignore[arg-type]

    def checkpoint(self, model: str) -> ModelInfo:
        return self.model

    async def accept(self, request: Request, checkpoint: ModelInfo) -> AnswerQueue:
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
async def ask(coordinator: ManyTokens) -> AsyncIterator[Callable[..., Any]]:
    transport = httpx.ASGITransport(application(RequestService(coordinator, Metrics())))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:

        async def post(path: str, **more: object) -> Any:
            answer = await client.post(path, json=ROUTES[path] | more)
            assert answer.status_code == 200, answer.text
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
    assert 1 <= coordinator.texts.most <= 2 * (len(TOP) + 1)


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


def test_encoded_parts_keep_their_places() -> None:
    data = {"a": Encoded("[1,2]"), "b": ["x", Encoded('{"c":"\\""}')], "d": Encoded("null")}
    assert compact(data) == '{"a":[1,2],"b":["x",{"c":"\\""}],"d":null}'
    with pytest.raises(TypeError, match="set"):
        compact({1: {2}})
