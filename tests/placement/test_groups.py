"""Groups of workers as candidates: what one rank holds, what the sums of all cost, and what a plan makes of it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest

from cluster.coordinator.planner import capacity, make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.all_reduce import AllReduce, SumSource
from cluster.core.errors import DoesNotFit, InsecureGroup, InvalidOption, NoPlan
from cluster.core.limits import BALANCE_SLACK, GIB
from cluster.core.plan import (
    LayerRange,
    Link,
    ModelRef,
    ModelShape,
    Objective,
    Plan,
    Profile,
    RankSizes,
    SharedWeight,
    Speculation,
)
from cluster.core.worker import WorkerInfo
from cluster.placement.candidates import ASSUMED_LINK, Candidate, Candidates
from cluster.placement.group_choice import propose_groups
from cluster.placement.groups import SUMS_PER_LAYER, combine_groups, estimate_all_reduce, sum_speed
from cluster.placement.layout_forecast import token_s
from cluster.placement.memory_split import WorkerMemory, needed_bytes
from cluster.placement.predicted_step_time import decode_s
from cluster.placement.propose import PlanRequest

LAYERS = 8
HEAD = SharedWeight("head", 2 * GIB, (LAYERS - 1,))
HALF = RankSizes(2, (2 * GIB,) * LAYERS, (GIB // 4,) * LAYERS, (HEAD,), flops=(5e9,) * LAYERS, heads=4)
SHAPE = ModelShape(
    ModelRef("m", "", "f" * 64),
    LAYERS,
    (4 * GIB,) * LAYERS,
    (GIB // 2,) * LAYERS,
    (HEAD,),
    tuple(range(1, LAYERS)),
    (),
    4096,
    flops=(1e10,) * LAYERS,
    boundary_bytes=(0,) + (16384,) * (LAYERS - 1),
    heads=8,
    rank_sizes=(HALF,),
)
FAST = Profile(600e9, 60e-6, 300e-6, 1e13)


def mac(name: str, gib: int = 64, address: str = "127.0.0.1", profile: Profile = FAST) -> WorkerInfo:
    return WorkerInfo(name, name, "", f"{address}:1", f"{address}:2", "", "", "", gib * GIB, gib * GIB, profile=profile)


def grouped(*groups: tuple[str, ...], **more: object) -> LoadOrder:
    return replace(LoadOrder("m"), groups=groups, **more)  # type: ignore[arg-type]


def test_a_rank_holds_its_part_and_the_whole_of_what_is_outside_the_layers() -> None:
    half = SHAPE.of_rank(2)
    assert half.stage_bytes(LayerRange(0, LAYERS)) == LAYERS * 2 * GIB + HEAD.nbytes
    assert half.stage_cache_bytes(LayerRange(0, LAYERS)) == LAYERS * GIB // 4
    assert SHAPE.of_rank(1) is SHAPE
    with pytest.raises(ValueError, match="3 ranks"):
        SHAPE.of_rank(3)


def test_a_group_takes_the_time_of_its_slowest_member_and_of_two_sums_a_layer() -> None:
    slow = replace(FAST, bandwidth=300e9)
    pair = [Candidate(WorkerMemory("a", 64 * GIB), FAST), Candidate(WorkerMemory("b", 48 * GIB), slow)]
    reduce = AllReduce(50e-6, 5e9)
    (group,) = combine_groups(SHAPE, Candidates(pair, sums=reduce), [("a", "b")]).workers
    assert (group.name, group.ranks, group.memory.nbytes) == ("a+b", 2, 48 * GIB)
    every = LayerRange(0, LAYERS)
    sums = SUMS_PER_LAYER * LAYERS * reduce.seconds_of(16384)
    assert group.decode_s(SHAPE, every) == pytest.approx(decode_s(SHAPE.of_rank(2), slow, every) + sums)
    chunk = 2048
    exchanged = SUMS_PER_LAYER * LAYERS * chunk * 16384 / reduce.bandwidth
    work = chunk * LAYERS * 5e9 / FAST.flops
    starting = FAST.step_s + LAYERS * group.profile.layer_s
    assert group.prefill_s(SHAPE, every, chunk) == pytest.approx(starting + work + exchanged)


def test_measured_sums_replace_the_estimate_of_that_group_alone() -> None:
    pair = [Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in "abc"]
    measured = AllReduce.measured(50e-6, 1e8)
    known = Candidates(pair, measured_sums={frozenset("ab"): measured})
    assert sum_speed(known, pair[:2]) == sum_speed(known, pair[1::-1]) == measured
    assert sum_speed(known, pair[1:]) == estimate_all_reduce(ASSUMED_LINK, 2)
    assumed = AllReduce(10e-6, 5e9, SumSource.ASSUMED)
    assert sum_speed(Candidates(pair, sums=assumed), pair[:2]) == assumed


def test_sums_over_a_ring_take_a_round_trip_for_each_further_rank() -> None:
    link = Link(400e-6, 1e9)
    assert estimate_all_reduce(link, 2) == AllReduce(pytest.approx(400e-6), 1e9)  # type: ignore[arg-type]
    assert estimate_all_reduce(link, 3).seconds == pytest.approx(800e-6)


def test_each_rank_is_a_seat_of_the_plan() -> None:
    """Two groups, each a stage: four workers, two lanes, and the memory of the rank that has least."""
    macs = [mac("a"), mac("b", 40), mac("c"), mac("d")]
    order = grouped(("a", "b"), ("c", "d"), layers=(LayerRange(0, 3), LayerRange(3, LAYERS)))
    plan = make_plan(7, SHAPE, macs, order)
    seats = [(s.worker, str(s.layers), s.spec.index, s.spec.rank, s.spec.ranks, s.spec.readers) for s in plan.stages]
    assert seats == [
        ("a", "0-2", 0, 0, 2, 2),
        ("b", "0-2", 0, 1, 2, 1),
        ("c", "3-7", 1, 0, 2, 1),
        ("d", "3-7", 1, 1, 2, 1),
    ]
    assert [s.worker for s in plan.pipeline] == ["a", "c"]
    assert plan.is_grouped
    assert plan.lanes == 2
    assert [s.weight_bytes for s in plan.stages] == [6 * GIB, 6 * GIB, 12 * GIB, 12 * GIB]
    limits = capacity(plan, SHAPE, order, macs)
    assert limits.budget == (plan.stages[1].cache_bytes, plan.stages[2].cache_bytes)
    assert limits.cost_of(4096) == (3 * GIB // 4, 5 * GIB // 4)
    assert limits.window == 3


def test_a_group_fits_where_none_of_its_members_could_hold_the_model() -> None:
    macs = [mac("a", 26), mac("b", 26)]
    with pytest.raises(DoesNotFit):
        make_plan(1, SHAPE, macs, LoadOrder("m", worker_count=1))
    plan = make_plan(1, SHAPE, macs, grouped(("a", "b")))
    assert [(s.worker, str(s.layers)) for s in plan.stages] == [("a", "0-7"), ("b", "0-7")]
    with pytest.raises(DoesNotFit):
        make_plan(1, SHAPE, [mac("a", 26), mac("b", 16)], grouped(("a", "b")))


def test_a_hop_into_a_group_lasts_until_its_last_rank_has_the_frame() -> None:
    slow, quick = Link(1e-3, 1e9), Link(1e-4, 1e9)
    names = ("x", "a", "b")
    links = {(one, other): quick for one in names for other in names if one != other} | {("x", "b"): slow}
    workers = [Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in names]
    found = combine_groups(SHAPE, Candidates(workers, links), [("a", "b")])
    x, pair = found.workers
    assert found.between(x, pair) == slow
    assert found.between(pair, x) == quick
    ranges = (LayerRange(0, 4), LayerRange(4, LAYERS))
    stages = x.decode_s(SHAPE, ranges[0]) + pair.decode_s(SHAPE, ranges[1])
    hops = slow.hop_s(16384) + found.ends_s()
    assert token_s(SHAPE, found, (x, pair), ranges) == pytest.approx(stages + hops)


def test_off_loopback_a_group_needs_consent() -> None:
    macs = [mac("a"), mac("b", address="192.168.1.5")]
    with pytest.raises(InsecureGroup, match=r"--insecure-links a\+b"):
        make_plan(1, SHAPE, macs, grouped(("a", "b")))
    accepted = make_plan(1, SHAPE, macs, grouped(("a", "b"), insecure_links=(("b", "a"),)))
    assert accepted.is_grouped
    exposed = "neither authenticated nor encrypted"
    assert exposed in accepted.reasons[-1]
    inside = make_plan(1, SHAPE, [mac("a"), mac("b")], grouped(("a", "b")))
    assert not any(exposed in reason for reason in inside.reasons)


def test_what_cannot_be_combined_is_said() -> None:
    with pytest.raises(NoPlan, match=r"worker c of the group a\+c is not here"):
        make_plan(1, SHAPE, [mac("a"), mac("b")], grouped(("a", "c")))
    for more in (
        {"speculation": Speculation.AUTO},
        {"adapters": (("style", "folder"),)},
        {"groups": (("a", "b"), ("b", "c"))},
    ):
        with pytest.raises(InvalidOption):
            replace(grouped(("a", "b")), **more).check()  # type: ignore[arg-type]
    assert grouped(("a", "b")).wanted_workers == 2
    assert grouped(("a", "b"), worker_count=3).wanted_workers == 4


def pairs_of(plan: Plan) -> list[str]:
    return [stage.worker for stage in plan.stages if stage.spec.ranks > 1]


def test_a_group_is_taken_only_where_it_beats_the_pipeline() -> None:
    """Over RDMA it does. Over TCP it would not, and the plan says by how much."""
    fits = [mac("a", 96), mac("b", 96)]
    accepted = replace(LoadOrder("m"), insecure_links=(("a", "b"),))
    links = {pair: Link(3e-3, 1e9) for pair in (("a", "b"), ("b", "a"))}
    slow = make_plan(1, SHAPE, fits, accepted, links)
    assert pairs_of(slow) == []
    (said,) = [reason for reason in slow.reasons if "a+b" in reason]
    assert "16 sums of 3016 us (estimated from the links) take 48.3 ms of a token" in said
    quick = {pair: Link(20e-6, 50e9) for pair in links}
    fast = make_plan(1, SHAPE, fits, accepted, quick)
    assert pairs_of(fast) == ["a", "b"]
    assert fast.forecast is not None
    assert slow.forecast is not None
    assert fast.forecast.one_user > 1.7 * slow.forecast.one_user
    measured = make_plan(1, SHAPE, fits, accepted, quick, {frozenset("ab"): AllReduce.measured(3e-3, 1e9)})
    assert pairs_of(measured) == [], "what was measured counts, not what the links make expect"
    assert any("16 sums of 3000 us (measured) take 48.0 ms" in reason for reason in measured.reasons)
    apart = {frozenset("ab"): None}
    assert pairs_of(make_plan(1, SHAPE, fits, accepted, quick, apart)) == [], "its workers could not meet"
    assert pairs_of(make_plan(1, SHAPE, fits, grouped(("a", "b")), quick, apart)) == ["a", "b"], "it was asked for"
    assert pairs_of(make_plan(1, SHAPE, fits, LoadOrder("m"), quick)) == [], "nobody has accepted insecure links"
    guesses = replace(accepted, speculation=Speculation.AUTO)
    assert pairs_of(make_plan(1, SHAPE, fits, guesses, quick)) == []


def test_a_forced_group_says_what_it_costs() -> None:
    fits = [mac("a", 96), mac("b", 96), mac("c", 96)]
    links = {(one, other): Link(3e-3, 1e9) for one in "abc" for other in "abc" if one != other}
    plan = make_plan(1, SHAPE, fits, grouped(("b", "c")), links)
    assert pairs_of(plan) == ["b", "c"], "although a alone would be faster"
    assert "with the group b+c" in plan.reasons[0]
    assert plan.reasons[0].count("tokens/s") == 1


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all_layouts_and_groups(seed: int, objective: Objective) -> None:
    """Against a search of every order of every partition into single workers and groups."""
    rng = random.Random(seed)
    sums = AllReduce(rng.choice((10e-6, 100e-6, 1e-3)), 5e9)
    workers = [
        Candidate(WorkerMemory(name, rng.choice((24, 40, 64)) * GIB), replace(FAST, bandwidth=rng.choice((3e11, 8e11))))
        for name in "abcd"
    ]
    candidates = Candidates(workers, sums=sums)
    possible = [("a", "b"), ("c", "d"), ("b", "c")]
    request = PlanRequest(objective)
    found = propose_groups(SHAPE, candidates, request, (), possible)
    rates = [
        rate_of(layout, combined, objective)
        for groups in ((), *((pair,) for pair in possible), possible[:2])
        for combined in [combine_groups(SHAPE, candidates, groups)]
        for count in range(1, len(combined.workers) + 1)
        for chosen in permutations(combined.workers, count)
        for cuts in combinations(range(1, LAYERS), count - 1)
        for layout in [(chosen, tuple(LayerRange(a, b) for a, b in pairwise((0, *cuts, LAYERS))))]
        if all(needed_bytes(SHAPE, r, 1, w.ranks) <= w.memory.usable for w, r in zip(*layout, strict=True))
    ]
    assert found.forecast is not None
    best = max(rates)
    have = rate_of((found.workers, found.ranges), candidates, objective)
    # For one user, the planner may give up a little for stages of more equal size.
    assert (
        best * (1 - BALANCE_SLACK - 1e-9 if objective is Objective.LATENCY else 1 - 1e-9) <= have <= best * (1 + 1e-9)
    )


def rate_of(
    layout: tuple[tuple[Candidate, ...], tuple[LayerRange, ...]], candidates: Candidates, objective: Objective
) -> float:
    """Return the tokens a second by which a layout is judged."""
    if objective is Objective.LATENCY:
        return 1 / token_s(SHAPE, candidates, *layout)
    return 1 / max(worker.decode_s(SHAPE, layers) for worker, layers in zip(*layout, strict=True))
