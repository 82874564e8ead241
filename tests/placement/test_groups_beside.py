"""Groups among several models: every layout of a model has its groups, and a rank's memory counts on each Mac."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.coordinator.joint_planner import ModelToPlace, plan_models
from cluster.coordinator.neighbours import Neighbours, describe_loaded, plan_beside
from cluster.coordinator.offline_planner import plan_for, plan_models_for
from cluster.coordinator.planner import explain_exposure, make_plan, offer_workers
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import InvalidOption
from cluster.core.joint_plan import JointPlan
from cluster.core.limits import GIB
from cluster.core.plan import Profile
from cluster.core.worker import WorkerInfo
from placement.test_groups import HEAD, LAYERS, SHAPE, grouped, mac


def plan_together(
    macs: Sequence[WorkerInfo], *orders: LoadOrder, pinned: bool = False, exposed: bool = False
) -> JointPlan:
    models = [ModelToPlace(name, order, SHAPE, pinned) for name, order in zip("xyz", orders, strict=False)]
    return plan_models(
        models,
        lambda shape, order: offer_workers(shape, macs, order),
        lambda plan: explain_exposure(plan, None if exposed else macs),
    )


def seats(made: JointPlan) -> dict[str, list[tuple[str, int, int]]]:
    return {one.name: [(s.worker, s.rank, s.ranks) for s in one.plan.stages] for one in made.models}


def test_a_model_keeps_its_group_and_the_next_one_takes_a_mac_that_it_leaves_free() -> None:
    macs = [mac(name) for name in "abc"]
    made = plan_together(macs, grouped(("a", "c")), LoadOrder("m"))
    assert seats(made) == {"x": [("a", 0, 2), ("c", 1, 2)], "y": [("b", 0, 1)]}
    assert made.reasons[0] == "y is on b, which x leaves free"
    uses = {one.worker: [(used.name, used.weight_bytes) for used in one.models] for one in made.memory}
    half = LAYERS * 2 * GIB + HEAD.nbytes
    assert uses == {"a": [("x", half)], "b": [("y", LAYERS * 4 * GIB + HEAD.nbytes)], "c": [("x", half)]}
    assert "with the group a+c, 16 sums of" in made.models[0].plan.reasons[0]


def test_where_no_speed_is_known_a_group_is_a_stage_of_all_macs() -> None:
    macs = [mac(name, profile=Profile()) for name in "abc"]
    made = plan_together(macs, grouped(("a", "c")), LoadOrder("m"))
    assert seats(made) == {"x": [("a", 0, 2), ("c", 1, 2), ("b", 0, 1)], "y": [("b", 0, 1)]}


def test_two_models_share_a_group_if_each_rank_has_room_for_both() -> None:
    order = grouped(("a", "b"))
    made = plan_together([mac("a", 64), mac("b", 48)], order, order)
    assert seats(made) == {name: [("a", 0, 2), ("b", 1, 2)] for name in "xy"}
    assert all(one.free_bytes >= 0 for one in made.memory)
    assert "shares them with x (which spends 100% of a token's time there); no Mac" in made.reasons[0]
    made = plan_together([mac("a", 64), mac("b", 30)], order, order)
    assert list(seats(made)) == ["x"]
    assert "y fits only when x is unloaded; then it would be on a and b" in made.reasons


def test_a_group_is_one_stage_of_a_pipeline_and_two_groups_are_two() -> None:
    macs = [mac(name, 24) for name in "abcd"]
    made = plan_together(macs, grouped(("a", "b"), ("c", "d")))
    assert [(s.worker, s.index, s.rank) for s in made.models[0].plan.stages] in (
        [("a", 0, 0), ("b", 0, 1), ("c", 1, 0), ("d", 1, 1)],
        [("c", 0, 0), ("d", 0, 1), ("a", 1, 0), ("b", 1, 1)],
    )
    made = plan_together([mac("a", 64), mac("b", 64), mac("c", 200)], grouped(("a", "b")))
    assert seats(made) == {"x": [("a", 0, 2), ("b", 1, 2)]}, "although c alone would do"


def test_a_group_that_cannot_be_is_told() -> None:
    made = plan_together([mac("a"), mac("b")], LoadOrder("m"), grouped(("a", "q")))
    assert list(seats(made)) == ["x"]
    assert made.left_out[0].why == "y: worker q of the group a+q is not here; start it, or leave it out"


def test_what_contradicts_a_group_is_refused_before_anything_is_read() -> None:
    for more, said in (
        ({"adapters": (("style", "nowhere"),)}, "adapters cannot be combined with --group"),
        ({"acceptance": 0.5}, "--acceptance cannot be combined with --group"),
    ):
        order = replace(LoadOrder("no/model"), groups=(("a", "b"),), **more)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match=said):
            plan_for(order, "m4-max-128x2", Path("nowhere"))
        with pytest.raises(InvalidOption, match=said):
            plan_models_for([ModelEntry("m", order)], "m4-max-128x2", Path("nowhere"))


def test_its_links_are_told_where_others_can_reach_them() -> None:
    exposed = "neither authenticated nor encrypted"
    inside = plan_together([mac("a"), mac("b")], grouped(("a", "b")))
    assert not any(exposed in reason for reason in inside.models[0].plan.reasons)
    assumed = plan_together([mac("a"), mac("b")], grouped(("a", "b")), exposed=True)
    assert exposed in assumed.models[0].plan.reasons[-1]


def test_a_model_to_come_keeps_its_group_and_one_that_is_loaded_goes_where_its_own_is() -> None:
    """The first is planned beside a model that will be a group on a and b, the second beside one that is."""
    macs = [mac("a", 64), mac("b", 64), mac("c", 40)]
    own, coming = ModelEntry("own", LoadOrder("m")), ModelEntry("next", grouped(("a", "b")), pin=True)
    beside = Neighbours("own", (), (own, coming))
    plan, _ = plan_beside(1, SHAPE, macs, own.order, {}, macs, beside, {"next": SHAPE})
    assert [stage.worker for stage in plan.stages] == ["c"]
    plan, _ = plan_beside(1, SHAPE, macs[:2], own.order, {}, macs[:2], beside, {"next": SHAPE})
    (alone,) = make_plan(1, SHAPE, macs[:2], own.order).stages
    assert plan.stages[0].cache_bytes < alone.cache_bytes - LAYERS * 2 * GIB
    held = describe_loaded("pair", [make_plan(1, SHAPE, macs, grouped(("a", "b")))], SHAPE)
    assert held.step_shares == {"a": 1.0, "b": 1.0}
    assert held.stage_bytes == LAYERS * (2 * GIB + GIB // 4) + HEAD.nbytes
    plan, _ = plan_beside(2, SHAPE, macs, own.order, {}, macs, Neighbours("own", (held,), (own,)), {})
    assert [stage.worker for stage in plan.stages] == ["c"]
    both = ModelEntry("own", grouped(("b", "c")))
    plan, _ = plan_beside(2, SHAPE, macs, both.order, {}, macs, Neighbours("own", (held,), (both,)), {})
    assert [(stage.worker, stage.spec.rank) for stage in plan.stages] == [("b", 0), ("c", 1)]
    assert "own is on b and c and shares b with pair" in plan.reasons[0]
