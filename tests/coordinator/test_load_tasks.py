"""A load that somebody ends by unloading its model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.coordinator.deployment import Deployment
from cluster.coordinator.load_tasks import LoadTasks
from cluster.coordinator.model_catalog import ModelCatalog, ModelEntry
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState
from cluster.core.errors import LoadEnded, NoWorkers
from integration.test_several_models import coordinating

pytestmark = pytest.mark.anyio
FOREVER_S = 1000.0


async def wait_for_load(deployment: Deployment) -> None:
    while "waiting for 1 worker" not in deployment.watch.sentence:
        await asyncio.sleep(0.01)


async def test_unload_ends_a_load_that_waits_for_workers_whoever_asked_for_it(tmp_path: Path) -> None:
    """There is no worker, so the loads would wait for ever."""
    sources = {"big": "faq", "small": "faq-draft"}
    entries = [ModelEntry(name, LoadOrder(source, wait_s=FOREVER_S)) for name, source in sources.items()]
    order = entries[1].order
    async with coordinating(SimpleNamespace(name="ended"), tmp_path, []) as coordinator:  # type: ignore[arg-type]
        coordinator.adopt_catalog(ModelCatalog(entries))
        on_demand = OnDemand(coordinator)
        small = coordinator.deployments["small"]
        for ask in (on_demand.load(order, name="small"), on_demand.await_ready("small", FOREVER_S)):
            load = asyncio.ensure_future(ask)
            await wait_for_load(small)
            assert await coordinator.unload("small") == ("small",)
            if ask.__name__ == "await_ready":
                assert await load, "a request gets the error"
            else:
                with pytest.raises(LoadEnded, match="the model was unloaded while it was being loaded"):
                    await load
            assert coordinator.state is ServingState.IDLE
            small.watch.sentence = ""
        assert await coordinator.unload("small") == ()
        with pytest.raises(LoadEnded):
            async with on_demand.hold("small"):
                pass


async def test_a_load_that_ends_otherwise_ends_as_it_did() -> None:
    tasks, freed = LoadTasks(), list[str]()

    async def fail() -> None:
        raise NoWorkers("there is none")

    async def load() -> None:
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            await asyncio.sleep(0)
            freed.append("memory")

    async def load_in_turn() -> None:
        await tasks.run("small", load())

    with pytest.raises(NoWorkers, match="there is none"):
        await tasks.run("small", fail())
    caller = asyncio.create_task(tasks.run("small", load_in_turn()))
    other = asyncio.create_task(tasks.run("other", load()))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert freed == ["memory"], "the load ends before its caller does"
    assert not await tasks.end("small")
    assert await tasks.end("other")
    with pytest.raises(LoadEnded):
        await other
