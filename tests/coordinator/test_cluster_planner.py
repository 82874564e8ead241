"""What the planner reads of models that are yet to be loaded: as much as it can in time, and each once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from cluster.coordinator import cluster_planner
from cluster.coordinator.cluster_planner import ClusterPlanner
from cluster.coordinator.neighbours import Neighbours
from cluster.coordinator.planner import make_plan
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import BadCheckpoint
from coordinator.test_planner import ORDER, SHAPE, worker

pytestmark = pytest.mark.anyio


class Reader:
    """Reads shapes: ``damaged``, ``gone`` and ``slow`` ones fail, or never come. ``read`` are the models it read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    async def read_shape(self, order: LoadOrder) -> Any:
        self.read.append(order.model)
        match order.model:
            case "damaged":
                raise BadCheckpoint("its headers are damaged")
            case "gone":
                raise PermissionError("denied")
            case "slow":
                await anyio.sleep_forever()
        return SHAPE


def planner(reader: Reader) -> ClusterPlanner:
    roster: Any = SimpleNamespace(members=())
    reporter: Any = None
    source: Any = reader
    return ClusterPlanner(roster, source, reporter)


async def caches_of(made: ClusterPlanner, *coming: str) -> int:
    """Return the bytes that the own model's caches get on a worker that all models fit on."""
    entries = tuple(ModelEntry(name, LoadOrder(name)) for name in (*coming, "own"))
    workers = [worker("a", 10_000)]
    plan, _ = await made.make_plan_beside(1, SHAPE, workers, ORDER, workers, Neighbours("own", (), entries))
    return plan.stages[0].cache_bytes


async def test_a_model_that_cannot_be_read_stops_no_load_and_is_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_planner, "COMING_READ_S", 0.05)
    alone = make_plan(1, SHAPE, [worker("a", 10_000)], ORDER).stages[0].cache_bytes
    reader = Reader()
    made = planner(reader)
    assert await caches_of(made) == alone
    assert await caches_of(made, "damaged", "gone") == pytest.approx(alone / 3, abs=200), "a third for each"
    assert await caches_of(made, "slow", "good") == pytest.approx(alone / 3, abs=200)
    assert reader.read == ["damaged", "gone", "slow"], "nothing is read after the deadline"


async def test_each_is_read_once_while_it_is_to_come() -> None:
    reader = Reader()
    made = planner(reader)
    both = await caches_of(made, "one", "two")
    assert await caches_of(made, "one", "two") == both
    assert reader.read == ["one", "two"]
    await caches_of(made, "two")
    await caches_of(made, "one", "two")
    assert reader.read == ["one", "two", "one"], "what no longer comes is forgotten"
    await caches_of(made, *(f"m{i}" for i in range(20)))
    assert len(reader.read) == 3 + cluster_planner.MAX_COMING
