"""What people hear of copies that are missing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.copy_keeper import NO_IDLE, CopyGoal, CopyKeeper
from cluster.coordinator.load_turns import LoadTurns
from cluster.core.cluster_state import ServingState
from cluster.core.errors import DoesNotFit, NoWorkers

pytestmark = pytest.mark.anyio
SERVING = SimpleNamespace(state=ServingState.SERVING)


class Cluster:
    """A deployment that wants copies, and the idle workers."""

    def __init__(self, most: int | None) -> None:
        self.most, self.idle = most, list[str]()
        self.told = list[str]()
        self.looked = asyncio.Event()
        self.deployment: Any = SimpleNamespace(
            name="rev",
            model_info=None,
            is_loading=False,
            replicas=[SERVING],
            copies=[],
            add_copy=self.add_copy,
            title=str,
        )
        self.deployment.model_info = SimpleNamespace(shape=SimpleNamespace(model=SimpleNamespace(name="rev")))
        self.keeper = CopyKeeper(self.goals, lambda: False, LoadTurns(), self, self.told.append)  # type: ignore[arg-type]

    def goals(self) -> list[CopyGoal]:
        return [CopyGoal(self.deployment, self.most)]

    async def present(self, wanted: None) -> list[Any]:
        self.looked.set()
        if not self.idle:
            raise NoWorkers("none is idle")
        return [SimpleNamespace(name=name) for name in self.idle]

    async def add_copy(self, macs: Any, report: Any) -> None:
        raise DoesNotFit("it lacks 9 bytes")

    async def look(self) -> None:
        """Let the keeper look for a copy, until it sleeps again."""
        self.looked.clear()
        self.keeper.wake()
        await self.looked.wait()
        while self.keeper._wake.is_set() or self.keeper._loading:
            await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_people_hear_once_how_many_replicas_are_missing_and_status_always_says_why() -> None:
    cluster = Cluster(most=2)
    assert cluster.keeper.problems() == ()
    await cluster.look()
    assert cluster.keeper.problems() == (f"rev has 1 of 2 replicas: {NO_IDLE}",)
    cluster.idle.append("c")
    await cluster.look()
    assert cluster.keeper.problems() == ("rev has 1 of 2 replicas: it lacks 9 bytes",)
    assert cluster.told == [f"rev has 1 of 2 replicas: {NO_IDLE}"]
    cluster.most = 1
    assert cluster.keeper.problems() == ()
    await cluster.keeper.close()


async def test_nothing_is_missing_of_as_many_copies_as_there_are_idle_macs() -> None:
    cluster = Cluster(most=None)
    await cluster.look()
    assert (cluster.keeper.problems(), cluster.told) == ((), [])
    await cluster.keeper.close()
