"""Three models on workers that hold two of them: loaded when they are asked for, evicted, pinned, named by aliases."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import anyio
import httpx
import openai
import pytest

from checkpoints import make
from cluster.api.http import answer_submission, sse
from cluster.api.http.app import application
from cluster.api.http.server import listen, serve
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator import eviction
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.plan import Plan
from cluster.model.tokenizer import load_tokenizer
from integration.daemons import Cluster, free_port
from integration.reference import greedy
from integration.test_several_models import coordinating

PROMPT = [(i * 37 + 11) % 250 for i in range(40)]
TOKENS, LONG = 12, 150
ARCHITECTURES = {"chat": "llama", "title": "qwen3", "code": "gemma3_text"}
CONTEXT = 256
MEMORY = "1MiB"
"""Of a worker: two of the models fit with one full context each, three do not."""


@dataclass
class Served:
    """A coordinator with an HTTP port in this process."""

    coordinator: Coordinator
    on_demand: OnDemand
    address: str
    folders: dict[str, Path]

    @property
    def loaded(self) -> set[str]:
        return {one.name for one in self.coordinator.deployments.values() if one.model_info}

    def adopt(self, **more: dict[str, Any]) -> None:
        """Take up a catalog with these options by name."""
        self.coordinator.adopt_catalog(
            ModelCatalog(
                [
                    ModelEntry(
                        name,
                        LoadOrder(str(folder), worker_count=1, max_context=CONTEXT, cached_contexts=1, wait_s=20),
                        **more.get(name, {}),
                    )
                    for name, folder in self.folders.items()
                ]
            )
        )

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def ask(self, name: str, **more: Any) -> httpx.Response:
        """Return the response to a greedy completion."""
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            return await client.post("/v1/completions", json={**body, **more})

    async def text(self, name: str) -> str:
        answer = await self.ask(name)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def expected(self, name: str, tokens: int = TOKENS) -> str:
        """Return mlx-lm's answer in one process."""
        return load_tokenizer(self.folders[name]).decode(greedy(self.folders[name], PROMPT, tokens))


@asynccontextmanager
async def serving(cluster: Cluster, folder: Path, ports: list[int], load_wait_s: float = 60.0) -> AsyncIterator[Served]:
    folders = {name: make(architecture, folder / name) for name, architecture in ARCHITECTURES.items()}
    async with coordinating(cluster, folder / "coordinator", ports) as coordinator:
        on_demand = OnDemand(coordinator, load_wait_s)
        coordinator.make_way = on_demand.make_way
        service = RequestService(coordinator, Metrics(), on_demand=on_demand)
        async with serve(application(service), listen("127.0.0.1", 0, encrypted=False), None) as address:
            served = Served(coordinator, on_demand, address, folders)
            served.adopt()
            try:
                yield served
            finally:
                await on_demand.close()


def run(folder: Path, test: Callable[[Served, list[Any]], Any], workers: int = 1) -> None:
    cluster, ports = Cluster(folder, mtls=False), [free_port() for _ in range(workers)]

    async def go() -> None:
        async with serving(cluster, folder, ports) as served:
            await test(served, daemons)

    try:
        daemons = [
            cluster.worker(f"w{i}", "--port", str(port), "--memory-limit", MEMORY) for i, port in enumerate(ports)
        ]
        for i, daemon in enumerate(daemons):
            daemon.wait_for(f"worker w{i} of cluster")
        anyio.run(go)
    finally:
        cluster.close()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_models_come_when_they_are_asked_for_and_the_least_recently_used_one_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)

    async def test(served: Served, workers: list[Any]) -> None:
        expected = {name: served.expected(name) for name in ARCHITECTURES}
        served.adopt(title={"aliases": ("claude-haiku-*", "small")})
        assert served.loaded == set()
        for name in ("chat", "claude-haiku-4-5", "small", "chat", "code"):
            assert await served.text(name) == expected[{"claude-haiku-4-5": "title", "small": "title"}.get(name, name)]
        assert served.loaded == {"chat", "code"}, "title was used before chat"
        served.adopt(chat={"pin": True}, title={"idle_unload_s": 60.0})
        assert await served.text("title") == expected["title"]
        assert served.loaded == {"chat", "title"}
        served.adopt(chat={"pin": True}, title={"idle_unload_s": 0.0})
        await served.on_demand.unload_idle()
        assert served.loaded == {"chat"}
        assert (await served.ask("nobody")).status_code == 404
        counted = {"model": "code", "messages": [{"role": "user", "content": "hello"}]}
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            for path, key in (("/v1/messages/count_tokens", "input_tokens"), ("/tokenize", "count")):
                assert (await client.post(path, json=counted)).json()[key] > 5
            for name in ("code:latest", "chat:latest"):
                assert (await client.post("/api/show", json={"model": name})).status_code == 200
        assert served.loaded == {"chat"}, "a tokenizer needs no weights"
        await refuse_beside_busy(served, expected)

    run(tmp_path, test)


async def refuse_beside_busy(served: Served, expected: dict[str, str]) -> None:
    """What does not fit beside a live answer and a pinned model is refused, or answered by its fallback."""
    assert await served.text("title") == expected["title"]
    served.adopt(chat={"pin": True}, code={"fallback": "title"})
    long_text, pieces = served.expected("title", LONG), list[str]()
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        stream = await client.completions.create(
            model="title", prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        async for chunk in stream:
            if not pieces:
                async with served.on_demand.hold("title"):  # the answer may be complete before it is read
                    await refuse_now(served)
            pieces.append(chunk.choices[0].text)
    assert "".join(pieces) == long_text
    await asyncio.sleep(1.1)  # a refusal is repeated for a second
    assert await served.text("code") == expected["code"]
    assert served.loaded == {"chat", "code"}


async def refuse_now(served: Served) -> None:
    fallen = await served.ask("code")
    assert (fallen.headers["x-macpipe-fallback"], fallen.json()["model"]) == ("title", "title")
    served.adopt(chat={"pin": True})
    refused = await served.ask("code")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    sentence = refused.json()["error"]["message"]
    assert "code does not fit beside title, which is busy, and chat, which is pinned: it needs" in sentence


@pytest.mark.long
@pytest.mark.timeout(300)
def test_real_clients_stream_from_a_model_that_is_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)
    monkeypatch.setattr(sse, "STREAM_COMMENT_S", 0.1)
    monkeypatch.setattr(answer_submission, "STREAM_BEGIN_S", 0.0)

    async def test(served: Served, workers: list[Any]) -> None:
        gpt = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        claude = anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0)
        async with gpt, claude:
            await stream_with(served, gpt, claude)
        await hang_up(served)

    run(tmp_path, test)


async def stream_with(served: Served, gpt: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic) -> None:
    turn: Any = [{"role": "user", "content": "hello"}]

    async def chat(name: str) -> str:
        stream = await gpt.chat.completions.create(model=name, messages=turn, max_tokens=8, temperature=0, stream=True)
        chunks = [chunk async for chunk in stream]
        assert any(chunk.choices[0].delta.content is None and not chunk.choices[0].finish_reason for chunk in chunks)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def response(name: str) -> str:
        async with gpt.responses.stream(model=name, input="hello", max_output_tokens=8, temperature=0) as stream:
            events = [event async for event in stream]
        assert [event.type for event in events].count("response.in_progress") > 1
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    async def message(name: str) -> str:
        async with claude.messages.stream(
            model=name, messages=turn, max_tokens=8, extra_body={"temperature": 0}
        ) as stream:
            return await stream.get_final_text()

    for ask in (chat, response, message):
        first, others = await ask("chat"), [await ask("title"), await ask("code")]
        assert "chat" not in served.loaded
        assert await ask("chat") == first
        assert first not in others
        await served.coordinator.unload(every=True)


async def hang_up(served: Served) -> None:
    """Clients that go while their model is loaded leave nothing behind, and the load goes on."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client, asyncio.timeout(60):
        for streamed in (True, False):
            asking = asyncio.create_task(client.post("/v1/messages", json={**body, "stream": streamed}))
            while not served.on_demand._holds:
                await asyncio.sleep(0.001)
            asking.cancel()
            while served.on_demand._holds:
                await asyncio.sleep(0.001)
            assert asking.cancelled()
    deployment = served.coordinator.deployments["chat"]
    async with asyncio.timeout(60):
        while not deployment.model_info:
            await asyncio.sleep(0.05)
    assert not deployment.has_requests


@pytest.mark.long
@pytest.mark.timeout(400)
def test_workers_that_die_while_models_come_and_go_end_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies while a model is read onto it, and one while it answers."""
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)

    async def test(served: Served, workers: list[Any]) -> None:
        expected = {name: served.expected(name) for name in ARCHITECTURES}
        plans: list[Plan] = []
        served.coordinator._report.planned = plans.append  # type: ignore[method-assign]

        def kill(plan: Plan) -> None:
            number = int(plan.stages[0].worker[1:])
            os.killpg(workers[number].process.pid, signal.SIGKILL)

        loading = asyncio.create_task(served.text("chat"))
        while not plans:
            await asyncio.sleep(0.01)
        kill(plans[0])
        assert await loading == expected["chat"]
        tokens = served.expected("chat", LONG)
        answering = asyncio.create_task(served.ask("chat", max_tokens=LONG))
        while not served.coordinator.deployments["chat"].has_requests:
            await asyncio.sleep(0.01)
        kill(served.coordinator.deployments["chat"].require_service().plan)
        assert (await answering).json()["choices"][0]["text"] == tokens
        for name in ("title", "code", "chat"):
            assert await served.text(name) == expected[name]

    run(tmp_path, test, workers=3)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_pinned_model_that_loses_its_worker_while_all_are_idle_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three models on two workers, one worker holds two, and two remain once the other worker is lost."""
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)

    async def test(served: Served, workers: list[Any]) -> None:
        expected = {name: served.expected(name) for name in ARCHITECTURES}
        for name in ARCHITECTURES:
            assert await served.text(name) == expected[name]
        assert served.loaded == set(ARCHITECTURES)
        deployments = {name: served.coordinator.deployments[name] for name in ARCHITECTURES}
        places = {name: deployment.first.workers for name, deployment in deployments.items()}
        (alone,) = (name for name, place in places.items() if list(places.values()).count(place) == 1)
        served.adopt(**{alone: {"pin": True}})
        least_recent, other = (name for name in ARCHITECTURES if name != alone)
        epoch = deployments[alone].require_service().plan.epoch
        os.killpg(workers[int(places[alone][0][1:])].process.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while (service := deployments[alone].require_service()).plan.epoch == epoch or service.recovery:
                await asyncio.sleep(0.05)
        assert served.loaded == {alone, other}
        assert served.coordinator.totals.tokens == len(ARCHITECTURES) * TOKENS, "the recovery's own token is no answer"
        for name in (alone, least_recent, other, alone):
            assert await served.text(name) == expected[name]
        assert alone in served.loaded, "it is pinned"

    run(tmp_path, test, workers=2)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_that_dies_while_a_model_leaves_for_another_serves_that_one_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)
    cluster, port = Cluster(tmp_path, mtls=False), free_port()

    def start() -> Any:
        return cluster.worker("w0", "--port", str(port), "--memory-limit", MEMORY)

    async def test() -> None:
        async with serving(cluster, tmp_path, [port]) as served:
            for name in ("chat", "title"):
                assert await served.text(name) == served.expected(name)
            chat = served.coordinator.deployments["chat"]
            asking = asyncio.create_task(served.ask("code"))
            while not chat.watch.sentence.startswith("unloading"):
                await asyncio.sleep(0.001)
            os.killpg(worker.process.pid, signal.SIGKILL)
            await anyio.to_thread.run_sync(start)
            assert (await asking).status_code in (200, 503)
            async with asyncio.timeout(120):
                while (answer := await served.ask("code")).status_code != 200:
                    assert answer.status_code == 503
            assert answer.json()["choices"][0]["text"] == served.expected("code")

    try:
        worker = start()
        worker.wait_for("worker w0 of cluster")
        anyio.run(test)
    finally:
        cluster.close()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_model_that_was_loaded_alone_makes_room_for_one_that_is_added_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)

    async def test(served: Served, workers: list[Any]) -> None:
        orders = {name: LoadOrder(str(served.folders[name]), 1, max_context=CONTEXT) for name in ("title", "chat")}
        title, chat = (ModelEntry(name, order, idle_unload_s=900.0) for name, order in orders.items())
        served.coordinator.adopt_catalog(ModelCatalog([title]))
        assert await served.text("title") == served.expected("title")
        alone = served.coordinator.deployments["title"].require_service().plan.max_sequences
        served.coordinator.adopt_catalog(ModelCatalog([title, chat]))
        assert await served.text("chat") == served.expected("chat")
        async with asyncio.timeout(120):
            while served.loaded != {"title", "chat"}:
                await served.coordinator.changed.wait()
                served.coordinator.changed.clear()
        plan = served.coordinator.deployments["title"].require_service().plan
        assert 1 <= plan.max_sequences < alone
        assert await served.text("title") == served.expected("title")

    run(tmp_path, test)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_idle_model_leaves_for_the_layers_of_a_drained_worker(tmp_path: Path) -> None:
    async def test(served: Served, workers: list[Any]) -> None:
        served.coordinator.make_way = served.on_demand.make_way
        for name in ("chat", "title", "code"):
            assert await served.text(name) == served.expected(name)
        assert served.loaded == {"chat", "title", "code"}
        (worker,) = served.coordinator.deployments["code"].first.workers
        await served.coordinator.drain(worker)
        assert len(served.loaded) == 2
        places = [served.coordinator.deployments[name].first.workers for name in served.loaded]
        assert all(worker not in macs for macs in places)
        assert await served.text("code") == served.expected("code")

    run(tmp_path, test, workers=2)
