"""Three models on workers that hold two of them: loaded when they are asked for, evicted, pinned, named by aliases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from checkpoints import make
from cluster.api.http.app import application
from cluster.api.http.server import listen, serve
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator import eviction
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import LoadOrder, ModelEntry
from integration.daemons import Cluster, free_port
from integration.test_several_models import coordinating

PROMPT = [(i * 37 + 11) % 250 for i in range(40)]
TOKENS = 12
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

    async def tokens(self, name: str) -> tuple[int, ...]:
        """Return the greedy tokens of a completion, in the names that log-probabilities give them."""
        async with httpx.AsyncClient(base_url=f"http://{self.address}", timeout=120) as client:
            body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]


@asynccontextmanager
async def serving(cluster: Cluster, folder: Path, ports: list[int], load_wait_s: float = 60.0) -> AsyncIterator[Served]:
    folders = {name: make(architecture, folder / name) for name, architecture in ARCHITECTURES.items()}
    async with coordinating(cluster, folder / "coordinator", ports) as coordinator:
        on_demand = OnDemand(coordinator, load_wait_s)
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
@pytest.mark.timeout(240)
def test_models_come_when_they_are_asked_for_and_the_least_recently_used_one_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "MIN_RESIDENT_S", 0.0)

    async def test(served: Served, workers: list[Any]) -> None:
        assert served.loaded == set()
        texts = {name: await served.tokens(name) for name in ("chat", "title")}
        assert served.loaded == {"chat", "title"}
        texts["code"] = await served.tokens("code")
        assert served.loaded == {"title", "code"}
        print(texts)

    run(tmp_path, test)
