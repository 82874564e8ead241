"""What the planner reads of models that are yet to be loaded, and when it has sums of groups measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from cluster.coordinator import cluster_planner
from cluster.coordinator.cluster_planner import ClusterPlanner
from cluster.coordinator.neighbours import Neighbours
from cluster.coordinator.planner import make_plan
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.all_reduce import AllReduce
from cluster.core.errors import BadCheckpoint
from cluster.core.plan import Plan, Profile
from cluster.core.worker import WorkerInfo
from coordinator.test_planner import ORDER, SHAPE, worker
from placement.test_groups import SHAPE as SHARED
from placement.test_groups import mac

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


class Sums:
    """Stands in for the measurement: which groups were looked up, and which measured, with consent or without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked_up: list[str] = []
        self.measured: list[tuple[str, bool]] = []
        self.terms = 0
        self._known: dict[str, AllReduce] = {}
        monkeypatch.setattr(cluster_planner, "find_sums", self._find)
        monkeypatch.setattr(cluster_planner, "measure_sums", self._measure)

    async def take_term(self, controls: list[Any]) -> None:
        self.terms += len(controls)

    async def _find(self, members: list[WorkerInfo], controls: list[Any]) -> AllReduce | None:
        self.looked_up.append(_names(members))
        return self._known.get(_names(members))

    def disturb(self, names: str) -> None:
        self._known[names] = AllReduce.measured(90e-6, 1e9, disturbed=True)

    async def _measure(self, members: list[WorkerInfo], controls: list[Any], *, insecure: bool) -> AllReduce | None:
        self.measured.append((_names(members), insecure))
        return self._known.setdefault(_names(members), AllReduce.measured(70e-6, 1e9))


def _names(members: list[WorkerInfo]) -> str:
    return "+".join(member.name for member in members)


async def load(made: ClusterPlanner, workers: list[WorkerInfo], order: LoadOrder) -> Plan:
    plan, _ = await made.make_plan_beside(1, SHARED, workers, order, workers, Neighbours("own", (), ()))
    return plan


async def test_sums_are_measured_before_a_load_once_and_only_looked_up_for_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums = Sums(monkeypatch)
    made = planner(Reader())
    roster: Any = SimpleNamespace(members=(), control=lambda address: address, take_term=sums.take_term)
    monkeypatch.setattr(made, "_roster", roster)

    async def no_links(found: object) -> dict[Any, Any]:
        return {}

    monkeypatch.setattr(made, "_measure_links", no_links)
    macs = [mac("a", 96), mac("b", 96), mac("c", 96)]
    forced = LoadOrder("m", groups=(("a", "b"),))
    said = (await made.make_plan(0, SHARED, macs, forced)).reasons
    assert any("(estimated from the links)" in reason for reason in said)
    assert (sums.looked_up, sums.measured, sums.terms) == (["a+b"], [], 0)
    said = (await load(made, macs, forced)).reasons
    assert any("16 sums of 70 us (measured)" in reason for reason in said)
    assert (await made.make_plan(0, SHARED, macs, forced)).reasons == said
    await load(made, macs, LoadOrder("m", insecure_links=(("b", "c"), ("a", "gone"))))
    assert sums.measured == [("a+b", False), ("b+c", True)], "what is known is not measured again"
    assert sums.terms == 4
    sums.disturb("a+b")
    await load(made, macs, forced)
    assert sums.measured[2:] == [("a+b", False)], "it may have been disturbed"
    unknown = [replace(one, profile=Profile()) for one in macs]
    await load(made, unknown, LoadOrder("m", groups=(("a", "c"),)))
    await load(made, macs, LoadOrder("m"))
    assert len(sums.measured) == 3, "nothing can be predicted of them, or nobody may form a group"
