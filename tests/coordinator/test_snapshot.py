"""The cluster's state, put together from what the coordinator's parts know."""

from __future__ import annotations

from dataclasses import replace

from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.planner import make_plan
from cluster.coordinator.ring import RingStage
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.snapshot import describe_plan, describe_workers, with_plan, with_requests
from cluster.coordinator.step_times import StageStepTime
from cluster.core.cluster_state import ClusterState, GuessCounts, LiveRequest, RequestState, ServingState
from cluster.core.limits import MIB
from cluster.core.plan import LayerRange, Link, ModelRef, ModelShape, Profile, Route
from cluster.core.worker import WorkerInfo
from cluster.membership.suspicion import Belief, Standing

SHAPE = ModelShape(ModelRef("m", "", "f"), 6, (10 * MIB,) * 6, (MIB,) * 6, (), (1, 2, 3, 4, 5), (), 64)
WORKERS = tuple(
    WorkerInfo(f"id-{name}", name, "1", f"{name}:1", f"{name}:2", "", "cpu", "", 0, 80 * MIB, cluster="c")
    for name in ("ada", "bob")
)
PLAN = make_plan(7, SHAPE, WORKERS, LoadOrder("m"))
RING = (RingStage("ada", "ada:2", Route.DIRECT), RingStage("bob", "bob:2", Route.RELAY))
IDLE = ClusterState("c", "1", ServingState.SERVING)
ASKED = LiveRequest("r", RequestState.QUEUED, 3, 0, 0, None, 1.0)
LOOP = LoopView(
    requests=(ASKED, replace(ASKED, request_id="s", state=RequestState.DECODE, lane=0)),
    lane_sizes=(1, 0),
    reserved_bytes=(10, 20),
    prefix_bytes=(1, 2),
    prefixes=4,
    bubbles=(0.25, 0.5),
    step_times=(StageStepTime(16, 3.0, 2.0),),
    busy_s=(8.0, 9.0),
    active_s=10.0,
)


def test_a_stage_is_shown_as_it_was_planned_and_as_it_is() -> None:
    state = with_plan(IDLE, PLAN, RING, LOOP)
    assert (state.model, state.epoch, state.layers, state.route) == ("m", 7, 6, Route.DIRECT)
    first, second = state.stages
    assert (first.worker, first.layers, first.input_route) == ("ada", LayerRange(0, 3), Route.DIRECT)
    assert (first.reserved_bytes, first.prefix_bytes, first.bubble_share) == (10, 1, 0.25)
    assert (first.measured_ms, first.expected_ms, first.measured_frames) == (3.0, 2.0, 16)
    assert (second.input_route, second.measured_ms) == (Route.RELAY, 0.0), "nothing is known of its frames yet"
    assert (second.busy_seconds, second.active_seconds) == (9.0, 10.0)


def test_guesses_are_shown_by_source_and_their_waste_by_stage() -> None:
    counts = (GuessCounts("ngram", 9, 5, 2),)
    loop = replace(LOOP, guesses=counts, wasted_s=(0.5, 1.5, 2.5))
    assert with_requests(IDLE, loop).guesses == counts
    assert with_requests(IDLE, replace(LOOP, guesses_without_room=3)).guesses_without_room == 3
    assert [s.wasted_seconds for s in with_plan(IDLE, PLAN, RING, loop).stages] == [0.5, 1.5]
    assert [s.wasted_seconds for s in with_plan(IDLE, PLAN, RING, LOOP).stages] == [0.0, 0.0]


def test_a_loop_of_other_stages_than_the_plan_has_is_no_error() -> None:
    """Plan and loop are two snapshots, and a recovery may come between them."""
    fewer = replace(LOOP, reserved_bytes=(10,), prefix_bytes=(1,), bubbles=(0.0,), step_times=(), busy_s=(8.0,))
    more = replace(LOOP, reserved_bytes=(1, 2, 3), prefix_bytes=(0,) * 3, bubbles=(0.0,) * 3, busy_s=(1.0,) * 3)
    assert [s.reserved_bytes for s in with_plan(IDLE, PLAN, RING, fewer).stages] == [10, 0]
    assert [s.reserved_bytes for s in with_plan(IDLE, PLAN, RING, more).stages] == [1, 2]
    assert [s.reserved_bytes for s in with_plan(IDLE, PLAN, RING, None).stages] == [0, 0]


def test_who_waits_is_counted() -> None:
    state = with_requests(IDLE, LOOP)
    assert (state.queued, state.lane_sizes, state.prefixes) == (1, (1, 0), 4)
    assert state.requests == LOOP.requests


def test_a_plan_that_is_not_loaded_has_the_planned_route_everywhere() -> None:
    plan = describe_plan(replace(PLAN, route=Route.RELAY))
    assert [(s.worker, s.input_route) for s in plan.stages] == [("ada", Route.RELAY), ("bob", Route.RELAY)]
    assert (plan.model, plan.layers, plan.reasons) == ("m", 6, PLAN.reasons)


def test_a_worker_is_shown_with_what_is_believed_of_it_and_a_duplicate_without() -> None:
    measured = replace(WORKERS[0], profile=Profile(4e11, 1e-5, 1e-4, 2e13, 0.2), draining=True)
    entries = [RosterEntry(measured), RosterEntry(measured, "two are named ada", reachable=False, duplicate=True)]
    belief = Belief("ada", Standing.SUSPECT, since=0.0, heard=0.0, losses=2)
    shown, twin = describe_workers(entries, [belief])
    assert (shown.name, shown.standing, shown.losses, shown.bandwidth, shown.draining) == (
        "ada",
        "suspect",
        2,
        4e11,
        True,
    )
    assert shown.silent_seconds > 0
    assert (twin.standing, twin.losses, twin.reachable, twin.problem) == ("up", 0, False, "two are named ada")


def test_a_stage_shows_the_measured_link_from_the_one_before() -> None:
    links = {("ada", "bob"): Link(0.002, 1e9), ("bob", "ada"): Link(0.004, 2e9)}
    ring = (RING[0], replace(RING[1], link=replace(links["ada", "bob"], interface="en0")))
    served = with_plan(IDLE, PLAN, ring, LOOP).stages
    assert [s.link_interface for s in served] == ["", "en0"]
    for stages in (served, describe_plan(PLAN, links).stages):
        assert [(s.link_round_trip_ms, s.link_bandwidth) for s in stages] == [(0.0, 0.0), (2.0, 1e9)]
    assert with_plan(IDLE, PLAN, RING, LOOP).stages[1].link_bandwidth == 0.0
