"""The search finds what brute force finds, for both objectives and for guessed tokens, with bounded work."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.limits import BALANCE_SLACK, GIB, GUESSED_GAP, MAX_HALVED, SPEED_NOISE_RATIO
from cluster.core.plan import LayerRange, ModelRef, ModelShape, Objective, Profile
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.guessed_token_time import guessed_token_s, steady_token_s
from cluster.placement.memory_split import WorkerMemory
from cluster.placement.predicted_step_time import decode_s
from cluster.placement.search import BestLayout, Search
from cluster.placement.stage_table import StageTable
from effort import effort
from placement.instances import Layout, clusters, layouts, shapes, stages_s, total_s

close = pytest.approx


def search(shape: ModelShape, candidates: Candidates, objective: Objective) -> Search:
    """Return a search that takes all speeds as exact."""
    return Search(StageTable(shape, 1), candidates, objective, noise=1.0)


@pytest.mark.timeout(300)
@settings(max_examples=effort(100, 1000, 25), deadline=None)
@given(shapes(), clusters())
def test_latency_is_what_trying_everything_finds(shape: ModelShape, candidates: Candidates) -> None:
    every = list(layouts(shape, candidates))
    found = search(shape, candidates, Objective.LATENCY).best(slack=0.0)
    if found is None:
        assert every == []
        return
    least = min(total_s(shape, candidates, one) for one in every)
    assert (found.workers, found.ranges) in every
    assert found.seconds == close(least, rel=1e-9)
    assert found.seconds == close(total_s(shape, candidates, (found.workers, found.ranges)), rel=1e-9)
    evened(shape, candidates, search(shape, candidates, Objective.LATENCY).best(), least)
    noisy = Search(StageTable(shape, 1), candidates, Objective.LATENCY).best()
    assert noisy
    assert (noisy.workers, noisy.ranges) in every
    assert noisy.seconds <= least * (1 + BALANCE_SLACK) * SPEED_NOISE_RATIO**2 * (1 + 1e-9)


def evened(shape: ModelShape, candidates: Candidates, found: BestLayout | None, least: float) -> None:
    """The default slack buys the quickest slowest stage that those workers in that order can have."""
    assert found
    bound = least * (1 + BALANCE_SLACK)
    same = [one for one in layouts(shape, candidates) if one[0] == found.workers]
    allowed = [one for one in same if total_s(shape, candidates, one) <= bound * (1 + 1e-9)]
    assert found.seconds <= bound * (1 + 1e-9)
    assert found.slowest <= min(max(stages_s(shape, one)) for one in allowed) * (1 + 1e-9)


@pytest.mark.timeout(300)
@settings(max_examples=effort(100, 1000, 25), deadline=None)
@given(shapes(), clusters())
def test_throughput_is_what_trying_everything_finds(shape: ModelShape, candidates: Candidates) -> None:
    every = list(layouts(shape, candidates))
    found = search(shape, candidates, Objective.THROUGHPUT).best()
    if found is None:
        assert every == []
        return
    slowest = min(max(stages_s(shape, one)) for one in every)
    assert found.slowest == close(slowest, rel=1e-9)
    as_quick = [one for one in every if max(stages_s(shape, one)) <= slowest * (1 + 1e-12)]
    assert found.seconds == close(min(total_s(shape, candidates, one) for one in as_quick), rel=1e-9)


@pytest.mark.timeout(300)
@settings(max_examples=effort(100, 1000, 25), deadline=None)
@given(shapes(), clusters(), st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0]))
def test_with_guesses_it_is_as_fast_as_trying_everything(
    shape: ModelShape, candidates: Candidates, acceptance: float
) -> None:
    every = list(layouts(shape, candidates))
    found = Search(StageTable(shape, 1), candidates, Objective.LATENCY, acceptance=acceptance).best()
    if found is None:
        assert every == []
        return
    assert (found.workers, found.ranges) in every

    def steady(one: Layout) -> float:
        lap = total_s(shape, candidates, one) + candidates.ends_s()
        return steady_token_s(lap, max(stages_s(shape, one)), len(one[0]), acceptance)

    def expected(one: Layout) -> float:
        stages = stages_s(shape, one)
        hops = total_s(shape, candidates, one) - sum(stages) + candidates.ends_s()
        return guessed_token_s(stages, hops, acceptance)

    least = min(map(steady, every))
    good = [one for one in every if steady(one) <= least / (1 - GUESSED_GAP) * (1 + 1e-9)]
    assert expected((found.workers, found.ranges)) <= max(map(expected, good)) * (1 + 1e-9)


@settings(max_examples=effort(40, 150, 10), deadline=None)
@given(shapes(), clusters())
def test_a_number_of_stages_and_a_worker_can_be_asked_for(shape: ModelShape, candidates: Candidates) -> None:
    every, asked = list(layouts(shape, candidates)), search(shape, candidates, Objective.LATENCY)
    for count in range(1, len(candidates.workers) + 1):
        of_that = [total_s(shape, candidates, one) for one in every if len(one[0]) == count]
        found = asked.best(stage_count=count, slack=0.0)
        assert (found.seconds if found else None) == (close(min(of_that), rel=1e-9) if of_that else None)
    chosen = candidates.workers[0]
    with_it = [total_s(shape, candidates, one) for one in every if chosen in one[0]]
    found = asked.best(including=chosen, slack=0.0)
    assert (found.seconds if found else None) == (close(min(with_it), rel=1e-9) if with_it else None)


@settings(max_examples=effort(40, 150, 10), deadline=None)
@given(shapes(), clusters())
def test_the_table_has_the_seconds_that_decode_s_predicts(shape: ModelShape, candidates: Candidates) -> None:
    table = StageTable(shape, 1)
    stages = [LayerRange(start, end) for start, end in combinations(table.positions, 2)]
    for worker in candidates.workers:
        seconds = table.seconds(worker, unbounded=True)
        assert seconds[np.triu_indices(len(table.positions), 1)] == close(
            [decode_s(shape, worker.profile, layers) for layers in stages], rel=1e-9
        )


def big(layers: int) -> ModelShape:
    return ModelShape(
        model=ModelRef("m", "", "f"),
        layers=layers,
        layer_bytes=(GIB,) * layers,
        cache_bytes=(GIB // 100,) * layers,
        shared=(),
        clean_cuts=tuple(range(1, layers)),
        unclean=(),
        max_context=4096,
        boundary_bytes=(16384,) * layers,
    )


def mac(i: int, gib: int, bandwidth: float) -> Candidate:
    return Candidate(WorkerMemory(f"w{i}", gib * GIB), Profile(bandwidth, 1e-4, 1e-4))


def test_sixteen_different_workers_and_128_layers_are_a_bounded_search() -> None:
    workers = [mac(i, 20 + i, 2e11 + 1e10 * i) for i in range(16)]
    for objective in Objective:
        asked = search(big(128), Candidates(workers), objective)
        found = asked.best()
        assert found
        assert not asked.every_order
        assert asked.visited <= 2 * 16 * 17 // 2
        assert found.ranges[-1].end == 128


def test_sixteen_alike_are_compared_in_every_order() -> None:
    asked = search(big(128), Candidates([mac(i, 24, 3e11) for i in range(16)]), Objective.THROUGHPUT)
    found = asked.best()
    assert found
    assert asked.every_order
    assert [len(r) for r in found.ranges] == [8] * 16
    assert asked.visited <= 32


@pytest.mark.parametrize("acceptance", [0.5, 0.9])
def test_with_guesses_more_macs_are_used_and_stages_grow_towards_the_end(acceptance: float) -> None:
    workers = [mac(i, 100, 3e11) for i in range(4)]
    found = Search(StageTable(big(7), 1), Candidates(workers), Objective.LATENCY, acceptance=acceptance).best()
    assert found
    assert [len(r) for r in found.ranges] == [1, 2, 2, 2]
    unequal = [mac(0, 30, 6e11), mac(1, 100, 3e11)]
    found = Search(StageTable(big(80), 1), Candidates(unequal), Objective.LATENCY, acceptance=acceptance).best()
    assert found
    assert [w.name for w in found.workers] == ["w0", "w1"], "the slow stage is the last one"


def test_a_wrong_guess_holds_a_slow_first_stage_and_not_a_slow_last_one() -> None:
    assert guessed_token_s([20.0, 5.0], 0.0, 0.5) == close(0.5 * (25 + 15) + 0.5 * 20)
    assert guessed_token_s([5.0, 20.0], 0.0, 0.5) == close(0.5 * 25 + 0.5 * 20)
    assert guessed_token_s([5.0, 20.0, 5.0], 0.0, 0.5) == close(0.5 * (30 + 10) + 0.5 * 20)
    assert guessed_token_s([20.0, 5.0], 0.0, 0.0) == 25.0
    assert guessed_token_s([10.0], 4.0, 0.9) == close(14.0), "on one Mac nothing overlaps"


@pytest.mark.parametrize(("count", "differ"), [(16, 1), (8, 1), (16, 0)])
def test_a_search_with_guesses_is_bounded(count: int, differ: int) -> None:
    workers = [mac(i, 40 + i * differ, 2e11 + 1e10 * i * differ) for i in range(count)]
    asked = Search(StageTable(big(128), 1), Candidates(workers), Objective.LATENCY, acceptance=0.7)
    found = asked.best()
    assert found
    assert found.ranges[-1].end == 128
    assert asked.visited <= 2 * MAX_HALVED


def test_equal_macs_share_evenly_and_the_fewest_are_used() -> None:
    workers = [mac(i, 40, 3e11) for i in range(4)]
    found = search(big(64), Candidates(workers), Objective.LATENCY).best()
    assert found
    assert found.ranges == (LayerRange(0, 32), LayerRange(32, 64))


def test_a_slower_mac_is_used_only_where_it_must_be() -> None:
    shape = big(64)
    workers = [mac(0, 100, 8e11), mac(1, 100, 1e11)]
    found = search(shape, Candidates(workers), Objective.LATENCY).best()
    assert found
    assert [w.name for w in found.workers] == ["w0"]
    two = search(replace(shape), Candidates(workers), Objective.THROUGHPUT).best()
    assert two
    assert sorted(len(r) for r in two.ranges) == [7, 57]
