"""A model's plan beside others: it avoids their Macs, and leaves room for those that are yet to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.coordinator.model_catalog import ModelEntry
from cluster.coordinator.neighbours import Neighbours, describe_loaded, plan_beside
from cluster.coordinator.planner import full_contexts, make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit
from cluster.core.plan import ModelShape, Plan, Profile
from cluster.core.worker import WorkerInfo
from cluster.placement.arrangement import LoadedModel
from cluster.placement.memory_split import memory_for
from coordinator.test_planner import SHAPE, worker

ENTRY = ModelEntry("own", LoadOrder("own"))
NEXT = ModelEntry("next", LoadOrder("next"))
"""A model of the same size: 400 bytes of weights, and 200 for each context."""


def macs(*sizes: int) -> list[WorkerInfo]:
    """Return workers, the first of which is the fastest, with so many usable bytes."""
    return [
        replace(worker(name, memory_for(size) + 2), profile=Profile(1e5 / (1 + i), 1e-6, 1e-6, 1e9))
        for i, (name, size) in enumerate(zip("abcd", sizes, strict=False))
    ]


def beside(
    workers: Sequence[WorkerInfo],
    *coming: ModelEntry,
    loaded: Sequence[Plan] = (),
    shapes: dict[str, ModelShape] | None = None,
    order: LoadOrder = ENTRY.order,
    everyone: Sequence[WorkerInfo] | None = None,
) -> tuple[Plan, LoadOrder]:
    neighbours = Neighbours("own", tuple(describe_loaded("loaded", [one], SHAPE) for one in loaded), (*coming, ENTRY))
    known = {entry.name: SHAPE for entry in coming} if shapes is None else shapes
    return plan_beside(3, SHAPE, workers, order, {}, everyone or workers, neighbours, known)


def where(plan: Plan) -> list[str]:
    return [stage.worker for stage in plan.stages]


def test_alone_it_is_planned_as_ever() -> None:
    assert beside(macs(900, 900)) == (make_plan(3, SHAPE, macs(900, 900), ENTRY.order, {}), ENTRY.order)


def test_it_avoids_the_macs_of_what_is_loaded_where_it_can() -> None:
    held = make_plan(1, SHAPE, macs(900), LoadOrder("loaded"), {})
    plan, order = beside(macs(900, 900), loaded=[held])
    assert where(plan) == ["b"], "though a is faster and has room"
    assert order == ENTRY.order, "nothing is to come, so it has all the memory there"
    assert plan.reasons[0] == "own is on b, which loaded leaves free"
    plan, _ = beside(macs(900, 500), loaded=[held])
    assert where(plan) == ["a"]
    assert plan.reasons[0].startswith("own is on a and shares it with loaded")


def test_its_caches_leave_room_for_what_comes_to_the_same_mac() -> None:
    plan, order = beside(macs(2000), NEXT)
    assert plan.stages[0].cache_bytes == 600, "three contexts of 200 beside as many of the other"
    assert order.cached_contexts == 3
    assert plan.max_sequences == 3
    again = make_plan(3, SHAPE, macs(2000), order, {})
    assert again.stages == plan.stages, "a recovery keeps to it"
    left = replace(worker("a", 0), memory_limit=memory_for(2000) + 2 - memory_for(1000), profile=macs(1)[0].profile)
    assert full_contexts(make_plan(3, SHAPE, [left], NEXT.order, {}).stages, SHAPE) >= 3
    chosen, _ = beside(macs(2000), NEXT, order=replace(ENTRY.order, cached_contexts=1))
    assert chosen.stages[0].cache_bytes == 200


def test_it_leaves_room_for_a_stage_of_a_model_on_another_mac_that_may_be_lost() -> None:
    plan, order = beside(macs(2000, 900), NEXT)
    assert (where(plan), order.cached_contexts) == (["a"], 5)
    assert plan.stages[0].cache_bytes == 2000 - 400 - 600, "the other needs 400 for its weights and 200 for a context"
    adopted, order = beside(macs(2000), NEXT, everyone=macs(2000, 900))
    assert (where(adopted), order.cached_contexts) == (["a"], 5), "it may use one of the Macs, the other both"
    held = make_plan(1, SHAPE, macs(900), LoadOrder("loaded"), {})
    plan, order = beside(macs(900, 2000), loaded=[held])
    assert (where(plan), order.cached_contexts) == (["b"], 5), "what is loaded on a may have to move here, too"
    tiny = LoadedModel("tiny", {}, {"a": 1.0}, stage_bytes=100)
    workers = macs(900, 2150)
    plan, order = plan_beside(3, SHAPE, workers, ENTRY.order, {}, workers, Neighbours("own", (tiny,), (ENTRY,)), {})
    assert (where(plan), order.cached_contexts) == (["b"], 8), "the room is less than a context"
    assert plan.stages[0].cache_bytes == 8 * 200 <= 2150 - 400 - 100
    small, order = beside(macs(2000, 700), loaded=[make_plan(1, SHAPE, macs(2000), LoadOrder("loaded"), {})])
    assert (where(small), order.cached_contexts) == (["b"], None), "it has no such room"


@pytest.mark.parametrize(("pin", "expected"), [(False, ["a"]), (True, ["b"])])
def test_it_makes_room_for_a_pinned_model_that_fits_nowhere_else(pin: bool, expected: list[str]) -> None:
    large = replace(SHAPE, layer_bytes=(200,) * 4, clean_cuts=())
    plan, _ = beside(macs(1100, 700), replace(NEXT, pin=pin), shapes={"next": large})
    assert where(plan) == expected


def test_what_does_not_fit_beside_all_that_comes_is_planned_without() -> None:
    plan, order = beside(macs(700), replace(NEXT, pin=True))
    assert (where(plan), order.cached_contexts) == (["a"], None)
    with pytest.raises(DoesNotFit):
        beside(macs(500), NEXT)


def test_of_a_model_that_cannot_be_read_only_the_number_counts() -> None:
    plan, order = beside(macs(1600), NEXT, shapes={})
    assert (plan.stages[0].cache_bytes, order.cached_contexts) == (600, 3)


def test_a_model_to_come_never_takes_the_place_of_the_one_that_is_loaded_now() -> None:
    important = replace(NEXT, priority=9)
    plan, _ = beside(macs(700), important)
    assert where(plan) == ["a"]
    plan, _ = beside(macs(700, 700), important)
    assert where(plan) == ["a"]
    plan, _ = beside(macs(700, 700), replace(important, pin=True))
    assert where(plan) == ["b"], "but a pinned one has its Mac reserved"


def test_models_that_have_their_memory_already_are_not_to_come() -> None:
    neighbours = Neighbours("own", (), (NEXT, ENTRY)).without({"own", "next"})
    assert (neighbours.waiting, neighbours.coming) == ((ENTRY,), ())
