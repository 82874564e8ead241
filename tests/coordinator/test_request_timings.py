"""A request's timings over its stages, and the idle time of each stage."""

from __future__ import annotations

import pytest

from cluster.coordinator.request_timings import LoopTotals, RequestTimings, SummedTotals
from cluster.coordinator.stage_utilization import StageUtilization
from cluster.core.frames import StageTiming
from cluster.core.limits import OCCUPANCY_S
from cluster.core.plan import LayerRange, ModelRef, PlannedStage, StageSpec
from cluster.scheduler.outcome import Outcome

SPECS = [StageSpec(1, i, 2, ModelRef("m", "", ""), LayerRange(i, i + 1), 64) for i in range(2)]
STAGES = [PlannedStage(spec, name, 1, 1) for spec, name in zip(SPECS, "ab", strict=True)]


def timings(first_us: int, second_us: int, wait_us: int = 0) -> tuple[StageTiming, ...]:
    return StageTiming(0, wait_us, first_us, 0), StageTiming(1, wait_us, second_us, 0)


def test_a_tally_splits_the_rings_time_into_compute_wait_and_wire() -> None:
    tally = RequestTimings(10.0, STAGES)
    for i in range(3):
        sent, back = 10.0 + i * 0.010, 10.008 + i * 0.010
        tally.frame(Outcome(("r",), timings(2000, 3000, 500), sent), back)
        tally.token(back)
    assert tally.ttft_ms == pytest.approx(8.0)
    assert tally.tpot_ms == pytest.approx(10.0)
    assert tally.tokens_per_second == pytest.approx(100.0)
    a, b = tally.figures()
    assert (a.compute_ms, b.compute_ms) == (6.0, 9.0)
    assert (a.wait_ms, b.wait_ms) == (1.5, 1.5)
    assert a.wire_ms + b.wire_ms == pytest.approx(3 * 8.0 - 15.0 - 3.0)


def test_a_lap_holds_the_frames_since_the_one_before() -> None:
    tally = RequestTimings(0.0, STAGES)
    for sent, back, compute in ((0.0, 0.010, 3000), (0.010, 0.030, 7000), (0.030, 0.034, 1000)):
        tally.frame(Outcome(("r",), timings(compute, compute), sent), back)
        if back > 0.010:  # the first frame is a prompt's
            a, b = tally.lap()
            assert (a.worker, a.layers) == ("a", LayerRange(0, 1))
            assert a.compute_ms == b.compute_ms == pytest.approx({0.030: 10.0, 0.034: 1.0}[back])
            assert a.wire_ms + b.wire_ms == pytest.approx({0.030: 30 - 20, 0.034: 4 - 2}[back])
    assert [(f.compute_ms, f.wire_ms, f.wait_ms) for f in tally.lap()] == [(0, 0, 0)] * 2


def test_a_lap_over_a_recovery_takes_no_time_back() -> None:
    tally = RequestTimings(0.0, STAGES)
    tally.frame(Outcome(("r",), timings(1000, 1000), 0.0), 0.010)
    tally.lap()
    tally.begin_epoch([PlannedStage(spec, name, 1, 1) for spec, name in zip(SPECS, "cd", strict=True)])
    tally.frame(Outcome(("r",), timings(2000, 2000), 0.010), 0.014)
    laps = {f.worker: (f.compute_ms, f.wire_ms) for f in tally.lap()}
    assert {worker: compute for worker, (compute, _) in laps.items()} == {"a": 0, "b": 0, "c": 2, "d": 2}
    assert all(wire >= 0 for _, wire in laps.values())


def test_one_token_has_no_time_between_tokens() -> None:
    tally = RequestTimings(0.0, STAGES)
    tally.token(0.5)
    assert (tally.ttft_ms, tally.tpot_ms, tally.tokens_per_second) == (500.0, 0.0, 0.0)


def test_a_stage_is_idle_while_the_ring_works_elsewhere() -> None:
    occupancy = StageUtilization(2)
    assert occupancy.bubbles(0.0) == (None, None)
    for i in range(10):
        occupancy.frame(i * 0.010, i * 0.010 + 0.010, timings(2500, 7500))
    assert occupancy.bubbles(0.1) == pytest.approx((0.75, 0.25))


def test_frames_that_overlap_count_the_rings_time_once() -> None:
    occupancy = StageUtilization(2)
    occupancy.frame(0.0, 0.010, timings(5000, 5000))
    occupancy.frame(0.005, 0.015, timings(5000, 5000))
    assert occupancy.bubbles(0.015) == pytest.approx((1 - 10 / 15, 1 - 10 / 15))
    assert (occupancy.active_s, *occupancy.busy_s) == pytest.approx((0.015, 0.010, 0.010))


def test_what_is_long_ago_counts_no_more() -> None:
    occupancy = StageUtilization(2)
    occupancy.frame(0.0, 1.0, timings(0, 0))
    later = OCCUPANCY_S + 2
    occupancy.frame(later, later + 1.0, timings(1_000_000, 500_000))
    assert occupancy.bubbles(later + 1.0) == pytest.approx((0.0, 0.5))
    assert occupancy.bubbles(later + 2.0 + OCCUPANCY_S) == (None, None), "nothing ran"
    assert (occupancy.active_s, *occupancy.busy_s) == pytest.approx((2.0, 1.0, 0.5))


def test_a_prompt_is_counted_once_for_all_its_samples() -> None:
    totals = LoopTotals()
    for sample in range(2):
        for index in range(3):
            totals.count_token(index, sample, prompt_tokens=9, cached_tokens=4)
    assert totals == LoopTotals(tokens=6, prompt_tokens=9, cached_tokens=4)


def test_what_a_loop_counted_stays_when_it_ends() -> None:
    totals = SummedTotals()
    one, other = totals.open_loop(), totals.open_loop()
    one.count_token(0, 0, prompt_tokens=9, cached_tokens=4)
    other.finished += 1
    totals.close_loop(one)
    other.count_token(0, 0, prompt_tokens=1, cached_tokens=0)
    assert totals.sum() == LoopTotals(finished=1, tokens=2, prompt_tokens=10, cached_tokens=4)
    totals.close_loop(other)
    assert totals.sum() == LoopTotals(finished=1, tokens=2, prompt_tokens=10, cached_tokens=4)
    assert totals.open_loop() == LoopTotals()
