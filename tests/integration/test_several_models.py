"""One worker daemon holds the slices of several models, each in an engine of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from checkpoints import make
from cluster.client import Client
from cluster.coordinator.coordinator import DEFAULT, Coordinator
from cluster.coordinator.model_catalog import ModelCatalog, ModelEntry
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState
from cluster.core.limits import ENGINE_CRASHES
from cluster.core.request import Request, SamplingParams, TokenEvent
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust
from cluster.store.store import Store
from cluster.transport.grpc_streams import GrpcDialer
from integration.daemons import Cluster, Daemon, alive, children, free_port, start_workers, wait_serving
from integration.reference import greedy

PROMPT = [(i * 37 + 11) % 250 for i in range(40)]


class Silent:
    """Reports nothing but problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def waiting(self, *_: Any) -> None: ...

    def planned(self, *_: Any) -> None: ...

    def progress(self, *_: Any) -> None: ...

    def serving(self, *_: Any) -> None: ...

    def problem(self, sentence: str) -> None:
        self.problems.append(sentence)


@asynccontextmanager
async def coordinating(cluster: Cluster, home: Path, ports: Sequence[int]) -> AsyncIterator[Coordinator]:
    """A coordinator in this process, over workers on these ports."""
    source = static_source([f"127.0.0.1:{port}" for port in ports])
    roster = Roster(source, cluster.name, "c0" * 8, LocalTrust())
    coordinator = Coordinator(
        cluster.name, roster, GrpcDialer(LocalTrust(), term=lambda: roster.terms.number), Silent(), Store(home)
    )
    try:
        yield coordinator
    finally:
        await coordinator.close()


class Asking:
    """Requests to the models of a coordinator, by deployment."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._sent = 0

    async def tokens(self, name: str, count: int) -> AsyncIterator[int]:
        deployment = self._coordinator._deployments[name]
        info = deployment.require_service().model_info
        self._sent += 1
        request = Request(f"r{self._sent}", tuple(PROMPT), SamplingParams(), max_tokens=count, ignore_eos=True)
        async for event in await self._coordinator.accept(request, info):
            if isinstance(event, TokenEvent):
                yield event.token

    async def answer(self, name: str, count: int) -> tuple[int, ...]:
        return tuple([token async for token in self.tokens(name, count)])


@pytest.mark.long
@pytest.mark.timeout(240)
def test_two_models_share_two_workers_and_each_outlives_the_loss_of_an_engine_and_of_a_worker(tmp_path: Path) -> None:
    folders = {"first": make("llama", tmp_path / "llama"), "second": make("qwen3", tmp_path / "qwen3")}
    cluster = Cluster(tmp_path, mtls=False)
    try:
        ports, daemons = start_workers(cluster, "ada", "bob")
        anyio.run(_share_two_workers, cluster, tmp_path / "coordinator", ports, folders, list(daemons.values()))
    finally:
        cluster.close()


async def _share_two_workers(
    cluster: Cluster, home: Path, ports: Sequence[int], folders: dict[str, Path], daemons: Sequence[Daemon]
) -> None:
    expected = {name: greedy(folder, PROMPT, 400) for name, folder in folders.items()}
    entries = [ModelEntry(name, LoadOrder(str(folder), worker_count=2)) for name, folder in folders.items()]
    async with coordinating(cluster, home, ports) as coordinator:
        coordinator.adopt_catalog(ModelCatalog(entries))
        await coordinator.load(entries[0].order, name="first")
        asking = Asking(coordinator)
        stream = asking.tokens("first", 400)
        seen = [await anext(stream)]
        await coordinator.load(entries[1].order, name="second")
        assert [len(member.info.slices) for member in await coordinator.members()] == [2, 2]
        seen += [token async for token in stream]
        assert tuple(seen) == expected["first"], "a load ended or changed an answer of another model"

        found: dict[str, list[tuple[int, ...]]] = {name: [] for name in folders}

        async def ask(name: str, count: int) -> None:
            found[name].append(await asking.answer(name, count))

        async def ask_twenty() -> None:
            async with anyio.create_task_group() as tasks:
                for i in range(20):
                    tasks.start_soon(ask, ("first", "second")[i % 2], 20 + i)

        await ask_twenty()
        loops = [service.loop for service in coordinator._services()]
        assert coordinator.totals.tokens == 400 + sum(len(a) for answers in found.values() for a in answers)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first", 400)
            tasks.start_soon(ask, "second", 400)
            await _until(lambda: all(len(loop.answers) for loop in loops))
            os.kill(children(daemons[0].process.pid)[1], signal.SIGKILL)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first", 400)
            tasks.start_soon(ask, "second", 400)
            await _until(lambda: all(len(loop.answers) for loop in loops))
            daemons[1].process.kill()
        await ask_twenty()
        for name, answers in found.items():
            assert all(answer == expected[name][: len(answer)] for answer in answers), name
            assert sorted(map(len, answers))[-2:] == [400, 400]
        tokens = coordinator.totals.tokens
        await coordinator.unload("second")
        assert coordinator.totals.tokens == tokens
        assert await asking.answer("first", 8) == expected["first"][:8]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_model_recovers_while_another_one_loads_and_two_loads_take_turns(tmp_path: Path) -> None:
    folders = {name: make("llama", tmp_path / name) for name in ("a", "b", "c")}
    cluster = Cluster(tmp_path, mtls=False)
    try:
        ports, daemons = start_workers(cluster, "ada", "bob")
        anyio.run(_recover_while_loading, cluster, tmp_path / "coordinator", ports, folders, list(daemons.values()))
    finally:
        cluster.close()


async def _recover_while_loading(
    cluster: Cluster, home: Path, ports: Sequence[int], folders: dict[str, Path], daemons: Sequence[Daemon]
) -> None:
    expected = greedy(folders["a"], PROMPT, 400)
    entries = {name: ModelEntry(name, LoadOrder(str(folder), worker_count=2)) for name, folder in folders.items()}
    async with coordinating(cluster, home, ports) as coordinator:
        coordinator.adopt_catalog(ModelCatalog(list(entries.values())))
        await coordinator.load(entries["a"].order, name="a")
        asking = Asking(coordinator)
        stream = asking.tokens("a", 400)
        seen = [await anext(stream)]
        activities = set[str]()

        async def load(name: str) -> None:
            await coordinator.load(entries[name].order, name=name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load, "b")
            tasks.start_soon(load, "c")
            killed = False
            while not killed or any(name not in _loaded(coordinator) for name in "bc"):
                activities.add(coordinator.activity)
                assert killed or coordinator.default_state is ServingState.SERVING, (
                    "a load of another model was told as its own"
                )
                if not killed and any("waiting until" in activity for activity in activities):
                    os.kill(children(daemons[0].process.pid)[0], signal.SIGKILL)
                    killed = True
                await anyio.sleep(0.02)
        seen += [token async for token in stream]
        assert tuple(seen) == expected
        assert any("waiting until b is loaded" in a or "waiting until c is loaded" in a for a in activities)
        for name in "abc":
            assert await asking.answer(name, 30) == greedy(folders[name], PROMPT, 30)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_coordinator_that_is_killed_while_two_models_answer_resumes_both(tmp_path: Path) -> None:
    folders = {name: make(kind, tmp_path / name) for name, kind in (("first", "llama"), ("second", "qwen3"))}
    expected = {name: greedy(folder, PROMPT, 300) for name, folder in folders.items()}
    cluster, port = Cluster(tmp_path, mtls=False), free_port()
    options = (str(folders["second"]), "--workers", "1", "--port", str(port), "--journal", "never")
    try:
        worker = cluster.worker("solo")
        worker.wait_for("worker solo of cluster")
        serve = cluster.serve(folders["first"], *options)
        wait_serving(f"127.0.0.1:{port}", serve)
        seen: dict[str, list[int]] = {}
        with Client(f"127.0.0.1:{port}", timeout_s=150) as client:
            assert client.generate(PROMPT, model="second", max_tokens=1).tokens == expected["second"][:1]
            streams = {
                name: iter(client.stream(PROMPT, model=name, max_tokens=300, ignore_eos=True, request_id=name))
                for name in folders
            }
            for name, stream in streams.items():
                seen[name] = [next(stream).token for _ in range(3)]
            engines = children(worker.process.pid)
            serve.process.kill()
        serve.process.wait(10)
        serve = cluster.serve(folders["first"], *options)
        wait_serving(f"127.0.0.1:{port}", serve)
        with Client(f"127.0.0.1:{port}", timeout_s=150) as client:
            for name in sorted(folders, reverse=True):
                assert len(seen[name]) < 300, f"the answer of {name} ended before the coordinator"
                seen[name].extend(token.token for token in client.resume(name, len(seen[name])))
                assert tuple(seen[name]) == expected[name], name
        assert children(worker.process.pid) == engines, "an engine was not adopted"
        assert "Traceback" not in serve.said()
    finally:
        cluster.close()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_further_engine_that_crashes_again_and_again_leaves_its_layers_to_another_worker(tmp_path: Path) -> None:
    folders = {"first": make("llama", tmp_path / "llama"), "second": make("qwen3", tmp_path / "qwen3")}
    cluster, ports = Cluster(tmp_path, mtls=False), [free_port(), free_port()]
    try:
        ada = cluster.worker("ada", "--port", str(ports[0]))
        ada.wait_for("worker ada of cluster")
        anyio.run(_crash_again_and_again, cluster, tmp_path / "coordinator", ports, folders, ada)
    finally:
        cluster.close()


async def _crash_again_and_again(
    cluster: Cluster, home: Path, ports: Sequence[int], folders: dict[str, Path], ada: Daemon
) -> None:
    entries = [ModelEntry(name, LoadOrder(str(folder), worker_count=1)) for name, folder in folders.items()]
    async with coordinating(cluster, home, ports) as coordinator:
        coordinator.adopt_catalog(ModelCatalog(entries))
        for entry in entries:
            await coordinator.load(entry.order, name=entry.name)
        bob = cluster.worker("bob", "--port", str(ports[1]))
        await anyio.to_thread.run_sync(bob.wait_for, "worker bob of cluster")
        first, second = (coordinator._deployments[name].require_service() for name in folders)
        first_epoch = first.plan.epoch
        stream = Asking(coordinator).tokens("second", 600)
        seen = [await anext(stream)]
        for _ in range(ENGINE_CRASHES):
            epoch = second.plan.epoch
            os.kill(children(ada.process.pid)[1], signal.SIGKILL)
            await _until(lambda epoch=epoch: second.plan.epoch > epoch and second.recovery is None)  # type: ignore[misc]
            seen.append(await anext(stream))
        assert second.plan.stages[0].worker == "bob"
        seen += [token async for token in stream]
        assert tuple(seen) == greedy(folders["second"], PROMPT, 600)
        assert first.plan.epoch == first_epoch


@pytest.mark.long
@pytest.mark.timeout(240)
def test_models_keep_apart_where_they_can_and_leave_each_other_room(tmp_path: Path) -> None:
    folders = {name: make("llama", tmp_path / name) for name in ("a", "b", "c")}
    cluster = Cluster(tmp_path, mtls=False)
    try:
        ports, _ = start_workers(cluster, "ada", "bob", options=("--memory-limit", "3MiB"))
        anyio.run(_keep_apart, cluster, tmp_path / "coordinator", ports, folders)
    finally:
        cluster.close()


async def _keep_apart(cluster: Cluster, home: Path, ports: Sequence[int], folders: dict[str, Path]) -> None:
    entries = [ModelEntry(name, LoadOrder(str(folder), max_context=256)) for name, folder in folders.items()]
    entries[0] = replace(entries[0], order=replace(entries[0].order, worker_count=1))
    async with coordinating(cluster, home, ports) as coordinator:
        coordinator.adopt_catalog(ModelCatalog(entries))
        for entry in entries:
            await coordinator.load(entry.order, name=entry.name)
        services = [coordinator.deployments[name].require_service() for name in folders]
        first, second, third = ([stage.worker for stage in service.plan.stages] for service in services)
        assert len(first) == 1
        assert first != second, "it avoids the first one's Mac"
        assert set(third) <= {*first, *second}
        for member in await coordinator.members():
            stages = [one for service in services for one in service.plan.stages if one.worker == member.info.name]
            assert sum(one.weight_bytes + one.cache_bytes for one in stages) < member.info.memory_limit
            assert all(one.cache_bytes for one in stages)
        for name, folder in folders.items():
            assert await Asking(coordinator).answer(name, 12) == greedy(folder, PROMPT, 12)


def _loaded(coordinator: Coordinator) -> set[str]:
    return {deployment.name for deployment in coordinator._deployments.values() if deployment.service}


async def _until(seen: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not seen():
            await anyio.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_two_models_share_a_worker_and_one_outlives_the_engine_of_the_other(tmp_path: Path) -> None:
    folders = {DEFAULT: make("llama", tmp_path / "llama"), "second": make("qwen3", tmp_path / "qwen3")}
    cluster, port = Cluster(tmp_path, mtls=False), free_port()
    try:
        worker = cluster.worker("solo", "--port", str(port))
        worker.wait_for("worker solo of cluster")
        anyio.run(_share, cluster, tmp_path / "coordinator", port, folders, worker.process.pid)
    finally:
        cluster.close()


async def _share(cluster: Cluster, home: Path, port: int, folders: dict[str, Path], daemon: int) -> None:
    expected = {name: greedy(folder, PROMPT, 600) for name, folder in folders.items()}
    async with coordinating(cluster, home, [port]) as coordinator:
        for name, folder in folders.items():
            await coordinator.load(LoadOrder(str(folder), worker_count=1, cached_contexts=4), name=name)
        engines = children(daemon)
        assert len(engines) == 2
        asking = Asking(coordinator)
        for name in folders:
            assert await asking.answer(name, 24) == expected[name][:24]
        recoveries = [deployment.require_service() for deployment in coordinator._deployments.values()]
        stream = asking.tokens(DEFAULT, 600)
        seen = [await anext(stream)]
        other = asking.tokens("second", 600)
        theirs = [await anext(other)]
        os.kill(engines[1], signal.SIGKILL)
        seen += [token async for token in stream]
        theirs += [token async for token in other]
        assert (tuple(seen), tuple(theirs)) == (expected[DEFAULT], expected["second"])
        assert alive(engines[0])
        assert [service.plan.epoch == service._first.plan.epoch for service in recoveries] == [True, False]
        await coordinator.unload("second")
        assert children(daemon) == engines[:1]
        assert await asking.answer(DEFAULT, 8) == expected[DEFAULT][:8]
        await coordinator.unload()
        (member,) = await coordinator.members()
        assert member.info.slices == ()
