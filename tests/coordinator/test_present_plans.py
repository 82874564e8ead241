"""What plans say of the models that are loaded now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.model_catalog import ModelEntry
from cluster.coordinator.present_plans import PresentPlans
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit, ModelTooLarge
from coordinator.test_on_demand import OLD_S, MemoryCluster, entry

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Planned:
    leaving: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ("it is fast",)


class PlanningCluster(MemoryCluster):
    """A coordinator that plans by bytes. ``chat`` has 6 of its 10, ``title`` 3 and ``code`` 5."""

    def __init__(self, *loaded: str) -> None:
        super().__init__(*(entry(name) for name in ("chat", "title", "code", "vast")))
        for name in loaded:
            deployment: Any = self.put(name, loaded_ago=OLD_S, used_ago=OLD_S)
            deployment.order = self.deployments.catalog.find(name).order
            deployment.first = SimpleNamespace(workers=("ada", "bob"))
        self.joint_planner = SimpleNamespace(plan_models=self.plan_models)
        self.plans = PresentPlans(self, self.demand)  # type: ignore[arg-type]

    async def plan(self, order: LoadOrder, *, leaving: Collection[str] = ()) -> Planned:
        if error := self.deployments[PurePath(order.model).name].refusal(leaving):
            raise error
        return Planned(tuple(leaving))

    async def plan_models(self, entries: Sequence[ModelEntry]) -> Planned:
        return Planned(reasons=("they fit at once",))

    async def reasons(self, name: str) -> tuple[str, ...]:
        return (await self.plans.plan(self.deployments.catalog.find(name).order)).reasons


async def test_a_plan_says_which_models_leave_for_it() -> None:
    cluster = PlanningCluster("chat", "title")
    assert await cluster.reasons("title") == ("it is fast",), "it is loaded, and has its own memory"
    assert await cluster.reasons("code") == ("it fits once chat is unloaded, as a load of it does", "it is fast")
    cluster.deployments["chat"].has_requests = True
    with pytest.raises(DoesNotFit, match="code does not fit beside chat, which is busy"):
        await cluster.reasons("code")
    with pytest.raises(ModelTooLarge, match="vast lacks 89"):
        await cluster.reasons("vast")
    with pytest.raises(DoesNotFit):
        await PlanningCluster().reasons("vast")


async def test_plans_of_several_models_say_what_fits_beside_those_that_are_loaded() -> None:
    entries = [entry(name) for name in ("chat", "title", "code", "vast")]
    assert (await PlanningCluster().plans.plan_models(entries)).reasons == ("they fit at once",)
    cluster = PlanningCluster("chat")
    assert (await cluster.plans.plan_models(entries)).reasons == (
        "they fit at once",
        "chat is loaded now, on ada and bob",
        "title fits now beside chat",
        "code fits now once chat is unloaded, as a load of it does",
        "beside what is loaded now: vast lacks 89",
    )
    assert (cluster.unloaded, cluster.begun) == ([], [])
