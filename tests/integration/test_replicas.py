"""Several copies of one model, each on workers of its own: requests go to the best one, and outlive the loss of one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from adapters import make_adapter
from checkpoints import make
from cluster.coordinator import copy_keeper
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.copy_keeper import NO_IDLE
from cluster.coordinator.deployment import Deployment
from cluster.coordinator.model_catalog import ModelCatalog, ModelEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState
from cluster.core.request import Request, SamplingParams, TokenEvent
from integration.daemons import Cluster, Daemon, free_port, start_workers
from integration.reference import greedy
from integration.test_several_models import coordinating

PROMPTS = [[(i * 37 + 11 + 5 * k) % 250 for i in range(40)] for k in range(4)]
WAIT_S = 60
ANSWER = 200
SMALL = ("--memory-limit", "640KiB")
"""A worker's memory: for one of the models with 256 tokens of context, and not for the weights of another."""


async def until(coordinator: Coordinator, seen: Callable[[], bool]) -> None:
    """Wait for something that is seen after a change of the coordinator's state."""
    with anyio.fail_after(WAIT_S):
        while not seen():
            coordinator.changed.clear()
            with anyio.move_on_after(0.2):
                await coordinator.changed.wait()


class Asking:
    """Requests to the model of a coordinator, and their tokens so far."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator, self.sent = coordinator, 0

    async def stream(self, prompt: list[int], count: int, adapter: str = "") -> AsyncIterator[int]:
        info = self.coordinator.served_model("", adapter)
        self.sent += 1
        key = info.adapter.key if info.adapter else ""
        request = Request(
            f"r{self.sent}", tuple(prompt), SamplingParams(), max_tokens=count, ignore_eos=True, adapter=key
        )
        answer = await self.coordinator.accept(request, info)
        async for event in answer:
            if isinstance(event, TokenEvent):
                yield event.token

    async def answer(self, prompt: list[int], count: int) -> tuple[int, ...]:
        return tuple([token async for token in self.stream(prompt, count)])


@asynccontextmanager
async def replicated(
    cluster: Cluster, home: Path, ports: list[int], order: LoadOrder, replicas: int | None
) -> AsyncIterator[tuple[Coordinator, Deployment]]:
    async with coordinating(cluster, home, ports) as coordinator:
        coordinator.adopt_catalog(ModelCatalog([ModelEntry("small", order, replicas=replicas)]))
        await coordinator.load(order, name="small")
        yield coordinator, coordinator.deployments["small"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("adapter", ["", pytest.param("one", marks=pytest.mark.long)])
def test_answers_go_on_at_the_other_replica_when_one_is_killed(adapter: str, tmp_path: Path) -> None:
    """With an adapter, it answers half of the requests."""
    folder, cluster = make("llama", tmp_path / "llama"), Cluster(tmp_path, mtls=False)
    try:
        ports, daemons = start_workers(cluster, "ada", "bob")
        anyio.run(_lose_one, cluster, tmp_path / "coordinator", ports, folder, daemons, adapter)
    finally:
        cluster.close()


async def _lose_one(
    cluster: Cluster, home: Path, ports: list[int], folder: Path, daemons: dict[str, Daemon], adapter: str
) -> None:
    order = LoadOrder(str(folder), worker_count=1, cached_contexts=8)
    folders = {"": None, adapter: make_adapter(folder, home / adapter, 1) if adapter else None}
    asked = list(zip(PROMPTS, (adapter, adapter, "", ""), strict=True))
    expected = [greedy(folder, prompt, 400, adapter=folders[name]) for prompt, name in asked]
    async with replicated(cluster, home, ports, order, 2) as (coordinator, deployment):
        await until(coordinator, lambda: len(deployment.replicas) == 2)
        if adapter:
            await coordinator.add_adapter(adapter, str(folders[adapter]))
        asking = Asking(coordinator)
        streams = [asking.stream(prompt, 400, name) for prompt, name in asked]
        seen = [[await anext(stream)] for stream in streams]
        assert all(replica.live for replica in deployment.replicas)
        lost = max(deployment.replicas, key=lambda replica: replica.live)
        (worker,) = lost.workers
        os.kill(daemons[worker].process.pid, signal.SIGKILL)
        async with asyncio.TaskGroup() as tasks:
            for stream, tokens in zip(streams, seen, strict=True):
                tasks.create_task(_read_rest(stream, tokens))
        assert [tuple(tokens) for tokens in seen] == expected
        assert lost.state is not ServingState.SERVING, "nothing had to be loaded for the answers"
        assert deployment.state is ServingState.SERVING
        assert await asking.answer(PROMPTS[-1], 24) == expected[-1][:24]
        assert coordinator.totals.tokens == 4 * 400 + 24
        await until(coordinator, lambda: lost not in deployment.replicas)
        with anyio.fail_after(WAIT_S):
            while not (warnings := (await coordinator.snapshot(ask=False)).warnings):
                await coordinator.changed.wait()
        assert warnings == (f"small has 1 of 2 replicas: {NO_IDLE}",), "nothing tries to load it until a Mac comes"


async def _read_rest(stream: AsyncIterator[int], tokens: list[int]) -> None:
    tokens += [token async for token in stream]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_copies_come_with_workers_and_go_for_other_models_and_drains(tmp_path: Path) -> None:
    folders, cluster = [make(kind, tmp_path / kind) for kind in ("llama", "qwen3")], Cluster(tmp_path, mtls=False)
    try:
        ports, _ = start_workers(cluster, "ada", "bob")
        late = free_port()
        anyio.run(_come_and_go, cluster, tmp_path / "coordinator", [*ports, late], folders)
    finally:
        cluster.close()


async def _come_and_go(cluster: Cluster, home: Path, ports: list[int], folders: list[Path]) -> None:
    own, other = (
        LoadOrder(str(folders[0]), worker_count=1),
        LoadOrder(str(folders[1]), worker_count=1, cached_contexts=8),
    )
    expected = greedy(folders[0], PROMPTS[0], 2000)
    async with replicated(cluster, home, ports, own, None) as (coordinator, deployment):
        await until(coordinator, lambda: len(deployment.replicas) == 2)
        asking, said = Asking(coordinator), asyncio.Event()
        answers = asyncio.create_task(_keep_answering(asking, expected, said))
        cluster.worker("cyd", "--port", str(ports[-1])).wait_for("worker cyd of cluster")
        await until(coordinator, lambda: len(deployment.replicas) == 3)
        await coordinator.load(other, name="other")
        second = coordinator.deployments["other"]
        assert len(deployment.replicas) == 2
        assert second.first.workers not in [replica.workers for replica in deployment.replicas]
        await coordinator.unload("other")
        await until(coordinator, lambda: len(deployment.replicas) == 3)
        for replica in (deployment.copies[0], deployment.first):
            (worker,) = replica.workers
            await coordinator.drain(worker)
            assert worker not in {name for one in deployment.replicas for name in one.workers}
        assert len(deployment.replicas) == 1
        said.set()
        await answers
        await coordinator.unload("small")
        await coordinator.load(own, name="small")
        assert await asking.answer(PROMPTS[0], 24) == expected[:24]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_copies_outlive_workers_that_stop_and_make_way_for_a_model_that_has_lost_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_keeper, "RETRY_S", 0.5)
    folders, cluster = [make(kind, tmp_path / kind) for kind in ("llama", "qwen3")], Cluster(tmp_path, mtls=False)
    try:
        anyio.run(_lose_copies, Workers(cluster, "ada", "bob", "cyd"), tmp_path / "coordinator", folders)
    finally:
        cluster.close()


class Workers:
    """Workers that hold one model each, and come back on their ports."""

    def __init__(self, cluster: Cluster, *names: str) -> None:
        self.cluster = cluster
        ports, self._daemons = start_workers(cluster, *names, options=SMALL)
        self.ports = dict(zip(names, ports, strict=True))

    def kill(self, name: str) -> None:
        os.killpg(self._daemons[name].process.pid, signal.SIGKILL)

    async def stop(self, name: str) -> int:
        """Stop a worker as its operator does. Return its exit code."""
        return await anyio.to_thread.run_sync(lambda: self._daemons[name].stop(timeout_s=WAIT_S))

    async def start(self, name: str) -> None:
        """Start a worker again."""
        self._daemons[name].process.wait(10)
        self._daemons[name] = self.cluster.worker(name, "--port", str(self.ports[name]), *SMALL)
        await anyio.to_thread.run_sync(self._daemons[name].wait_for, f"worker {name} of cluster")


async def _lose_copies(workers: Workers, home: Path, folders: list[Path]) -> None:
    small, other = (LoadOrder(str(folder), worker_count=1, max_context=256, cached_contexts=1) for folder in folders)
    expected, theirs = greedy(folders[0], PROMPTS[0], ANSWER), greedy(folders[1], PROMPTS[0], 24)
    ports = list(workers.ports.values())
    async with replicated(workers.cluster, home, ports, small, None) as (coordinator, deployment):
        await coordinator.load(other, name="other")
        await until(coordinator, lambda: len(deployment.replicas) == 2)
        asking, said = Asking(coordinator), asyncio.Event()
        answers = asyncio.create_task(_keep_answering(asking, expected, said))
        second = coordinator.deployments["other"]

        async def answer_other() -> tuple[int, ...]:
            info, request = second.require_service().model_info, Request("o", tuple(PROMPTS[0]), SamplingParams(), 24)
            events = await coordinator.accept(replace(request, ignore_eos=True), info)
            return tuple([event.token async for event in events if isinstance(event, TokenEvent)])

        (lost,) = second.first.workers
        workers.kill(lost)
        assert await answer_other() == theirs
        assert len(deployment.replicas) == 1, "its copy made way, since the other model was on no Mac"

        await workers.start(lost)
        with anyio.fail_after(WAIT_S):
            while coordinator._copies._loading is None:
                await anyio.sleep(0.01)
        workers.kill(lost)
        await until(coordinator, lambda: coordinator._copies._loading is None and len(deployment.replicas) == 1)
        await workers.start(lost)
        await until(coordinator, lambda: len(deployment.replicas) == 2)

        retired = deployment.first
        assert await workers.stop(*retired.workers) == 0
        assert retired not in deployment.replicas
        assert await answer_other() == theirs
        said.set()
        await answers


async def _keep_answering(asking: Asking, expected: tuple[int, ...], said: asyncio.Event) -> None:
    """Ask for one answer after the other until ``said``, two at a time. All must be whole."""

    async def ask() -> None:
        while not said.is_set():
            assert await asking.answer(PROMPTS[0], ANSWER) == expected[:ANSWER]

    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(ask())
