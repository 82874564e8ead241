"""One worker daemon holds the slices of several models, each in an engine of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from checkpoints import make
from cluster.coordinator.coordinator import DEFAULT, Coordinator
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import LoadOrder
from cluster.core.request import Request, SamplingParams, TokenEvent
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust
from cluster.store.store import Store
from cluster.transport.grpc_streams import GrpcDialer
from integration.daemons import Cluster, alive, children, free_port
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
    coordinator = Coordinator(cluster.name, roster, GrpcDialer(LocalTrust()), Silent(), Store(home))
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
        async for event in self._coordinator.submit(request, info):
            if isinstance(event, TokenEvent):
                yield event.token

    async def answer(self, name: str, count: int) -> tuple[int, ...]:
        return tuple([token async for token in self.tokens(name, count)])


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
