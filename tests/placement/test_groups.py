"""Groups of workers as candidates: what one rank holds, what the sums of all cost, and what a plan makes of it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest

from cluster.coordinator.planner import capacity, make_plan, plan_over
from cluster.coordinator.settings import LoadOrder
from cluster.core.all_reduce import SUMS_PER_LAYER, AllReduce, SumSource
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
from cluster.placement.group_choice import list_equal, list_possible, list_sizes, propose_groups
from cluster.placement.groups import combine_groups, estimate_all_reduce, sum_speed
from cluster.placement.layout_forecast import forecast, token_s
from cluster.placement.memory_split import WorkerMemory, needed_bytes
from cluster.placement.predicted_step_time import decode_s
from cluster.placement.propose import ChosenLayout, PlanRequest

LAYERS = 8
HEAD = SharedWeight("head", 2 * GIB, (LAYERS - 1,))
HALF = RankSizes(2, (2 * GIB,) * LAYERS, (GIB // 4,) * LAYERS, (HEAD,), flops=(5e9,) * LAYERS, heads=4)
QUARTER = RankSizes(4, (GIB,) * LAYERS, (GIB // 8,) * LAYERS, (HEAD,), flops=(2.5e9,) * LAYERS, heads=2)
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
    rank_sizes=(HALF, QUARTER),
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


def test_more_assumed_macs_than_have_a_cable_to_each_other_add_up_in_a_ring() -> None:
    workers = [Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in "abcde"]
    assumed = AllReduce(50e-6, 5e9, SumSource.ASSUMED)
    assert sum_speed(Candidates(workers, sums=assumed), workers[:4]) == assumed
    ring = sum_speed(Candidates(workers, sums=assumed), workers)
    assert ring.seconds == pytest.approx(400e-6)
    assert ring.bandwidth == pytest.approx(5e9 * 5 / 8)
    assert ring.source is SumSource.ASSUMED


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
            replace(grouped(("a", "b")), **more).check()
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
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_layouts_and_groups(seed: int, objective: Objective) -> None:
    """Against a search of every order of every partition into single workers and groups."""
    rng = random.Random(seed)
    sums = AllReduce(rng.choice((10e-6, 100e-6, 1e-3)), 5e9)
    workers = [
        Candidate(WorkerMemory(name, rng.choice((24, 40, 64)) * GIB), replace(FAST, bandwidth=rng.choice((3e11, 8e11))))
        for name in "abcd"
    ]
    candidates = Candidates(workers, sums=sums)
    possible: list[tuple[str, ...]] = [("a", "b", "c", "d"), *combinations("abcd", 2)]
    sets = [(), *((group,) for group in possible), *((("a", one), rest_of("a", one)) for one in "bcd")]
    found = propose_groups(SHAPE, candidates, PlanRequest(objective), (), possible)
    assert found.forecast is not None
    offered = [combine_groups(SHAPE, candidates, groups) for groups in sets]
    best = [(one, layout) for one in offered if (layout := best_of_all(one, objective))]
    forecasts = [forecast(SHAPE, one, *layout) for one, layout in best]
    if objective is Objective.THROUGHPUT:
        assert found.forecast.eight_users == pytest.approx(max(one.eight_users for one in forecasts))
    else:  # the planner may give up a little for stages of more equal size
        fastest = max(one.one_user for one in forecasts)
        assert fastest * (1 - BALANCE_SLACK - 1e-9) <= found.forecast.one_user <= fastest * (1 + 1e-9)


def rest_of(*pair: str) -> tuple[str, ...]:
    return tuple(name for name in "abcd" if name not in pair)


def best_of_all(candidates: Candidates, objective: Objective) -> ChosenLayout | None:
    """Return the best of all layouts with these groups by what ``Search`` compares, or None if none fits."""
    fitting = [
        layout
        for count in range(1, len(candidates.workers) + 1)
        for chosen in permutations(candidates.workers, count)
        for cuts in combinations(range(1, LAYERS), count - 1)
        for layout in [(chosen, tuple(LayerRange(a, b) for a, b in pairwise((0, *cuts, LAYERS))))]
        if all(needed_bytes(SHAPE, r, 1, w.ranks) <= w.memory.usable for w, r in zip(*layout, strict=True))
    ]

    def cost(layout: ChosenLayout) -> tuple[float, float]:
        lap = token_s(SHAPE, candidates, *layout)
        slowest = max(worker.decode_s(SHAPE, layers) for worker, layers in zip(*layout, strict=True))
        return (round(slowest, 12), lap) if objective is Objective.THROUGHPUT else (lap, slowest)

    return min(fitting, key=cost, default=None)


def test_equal_workers_form_groups_of_every_size_and_some_stay_alone() -> None:
    """Of five, each way to divide them into groups of 2, 3 and 4 and single ones is there at least once."""
    candidates = Candidates([Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in "abcde"])
    pools = list_equal(candidates)
    assert pools == [tuple("abcde")]
    possible = list_possible(candidates, pools, {2, 3, 4})
    sets = [s for n in range(3) for s in combinations(possible, n) if len(set().union(*s)) == sum(map(len, s))]
    assert {tuple(sorted(map(len, one))) for one in sets} == {(), (2,), (3,), (4,), (2, 2), (2, 3)}
    assert list_sizes(pools) == range(2, 6)
    assert not list_sizes([])


def test_workers_with_accepted_links_form_the_group_that_was_named_and_parts_of_it() -> None:
    slow = replace(FAST, bandwidth=300e9)
    workers = [Candidate(WorkerMemory(name, 64 * GIB), slow if name == "c" else FAST) for name in "abcd"]
    found = list_possible(Candidates(workers), [("d", "c", "b", "a")], {2, 4})
    assert found == [("d", "c", "b", "a"), ("d", "b"), ("a", "c")], "equal ones first"


@pytest.mark.parametrize("objective", list(Objective))
def test_four_equal_macs_are_a_group_of_four_where_sums_are_fast(objective: Objective) -> None:
    workers = [Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in "abcd"]
    order = replace(LoadOrder("m"), objective=objective)
    quick = plan_over(1, SHAPE, Candidates(workers, sums=AllReduce(20e-6, 5e9)), order)
    assert [stage.spec.ranks for stage in quick.pipeline] == [4]
    slow = plan_over(1, SHAPE, Candidates(workers, sums=AllReduce(0.1, 5e9)), order)
    assert not slow.is_grouped


def test_a_step_of_more_rows_adds_up_more_bytes() -> None:
    workers = [Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in "ab"]
    reduce = AllReduce(5e-3, 1e8)
    (group,) = combine_groups(SHAPE, Candidates(workers, sums=reduce), [("a", "b")]).workers
    every = LayerRange(0, LAYERS)
    more = group.decode_s(SHAPE, every, 8) - decode_s(SHAPE.of_rank(2), group.profile, every, 8)
    assert more == pytest.approx(SUMS_PER_LAYER * LAYERS * 7 * 16384 / reduce.bandwidth)


def test_the_time_of_sums_is_told_apart_from_the_start_of_layers() -> None:
    reduce = AllReduce(5e-3, 1e8)
    candidates = Candidates([Candidate(WorkerMemory(name, 64 * GIB), FAST) for name in "ab"], sums=reduce)
    plan = plan_over(1, SHAPE, candidates, grouped(("a", "b")))
    spent = SUMS_PER_LAYER * LAYERS * reduce.seconds_of(16384) * 1e3
    starting = (FAST.step_s + LAYERS * FAST.layer_s) * 1e3
    (said,) = [reason for reason in plan.reasons if reason.startswith("bound by")]
    assert said.startswith("bound by the sums of each layer: ")
    assert f"{starting:.1f} ms to starting layers, {spent:.1f} ms to sums of all ranks" in said
