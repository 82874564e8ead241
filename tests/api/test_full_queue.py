"""A client that fills the queue, over HTTP with two keys: the other client is let in, and each request ends once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.api.http.app import application
from cluster.api.key_usage import KeyUsage
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import NotServing
from cluster.core.limits import MAX_QUEUE
from cluster.core.plan import LayerRange, ModelRef, Plan, PlannedStage, Route, StageSpec
from cluster.core.request import Request
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.scheduler import Scheduler
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyStore
from fuzz.targets.asked import served
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio

SAMPLES = 32
MODEL = ModelRef("m", "", "")


class SilentRing:
    """Stages that never answer, so that requests stay where they are."""

    def send(self, message: bytes) -> None: ...

    def close(self) -> None: ...


class Waiting(WorkerlessCoordinator):
    """A coordinator whose engine loop has room for one sample; all others wait."""

    def __init__(self) -> None:
        stage = PlannedStage(StageSpec(1, 0, 1, MODEL, LayerRange(0, 1), 64), "mac", 1, 1)
        capacity = Capacity(1, 1, 1, (1 << 40,), (0,), lambda tokens: (tokens,))
        decoder: Any = object
        ring: Any = SilentRing()
        scheduler = Scheduler(1, capacity, frozenset())
        self.loop = EngineLoop(Plan(1, MODEL, (stage,), Route.RELAY, 64, 1, 1, 1), scheduler, decoder, print)
        self.loop.start(ring)

    def served_model(self, name: str, adapter: str = "") -> ModelInfo:
        return served()

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        answer = AnswerQueue(self.loop.post, samples=request.samples)
        self.loop.submit(request, answer)
        return answer

    async def samples(self) -> int:
        return len((await asyncio.wrap_future(self.loop.view())).requests)


@pytest.fixture
async def coordinator() -> AsyncIterator[Waiting]:
    waiting = Waiting()
    yield waiting
    waiting.loop.stop(NotServing("the test is over"))


async def test_one_key_that_fills_the_queue_keeps_no_other_out(coordinator: Waiting, tmp_path: Path) -> None:
    keys = KeyStore(ClusterFolder(tmp_path, "lab"))
    (_, greedy), (_, modest) = keys.create("greedy"), keys.create("modest")
    service = RequestService(coordinator, Metrics(), KeyUsage(keys))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(application(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:

        async def ask(key: str, samples: int) -> httpx.Response:
            body = {"prompt": "a", "n": samples, "max_tokens": 4}
            return await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})

        asked = [asyncio.create_task(ask(greedy, SAMPLES)) for _ in range(MAX_QUEUE // SAMPLES)]
        while await coordinator.samples() < MAX_QUEUE:
            await asyncio.sleep(0)
        assert (await ask(greedy, SAMPLES)).status_code == 429
        answered = asyncio.create_task(ask(modest, 2))
        done, left = await asyncio.wait((*asked, answered), return_when=asyncio.FIRST_COMPLETED)
        (displaced,) = done
        reply = displaced.result()
        assert displaced is not answered
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "2"
        assert await coordinator.samples() == MAX_QUEUE - SAMPLES + 2
        coordinator.loop.refuse(NotServing("the model is unloaded"))
        ended = await asyncio.gather(*left)
        assert [reply.status_code for reply in ended] == [503] * (MAX_QUEUE // SAMPLES)
