"""Measured times of frames, compared with the predictions for the same frames."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.step_times import StepTimes
from cluster.core.frames import StageTiming
from cluster.core.limits import LEARNED_FRAMES, LEAST_FRAMES
from cluster.core.plan import LayerRange, ModelRef, ModelShape, PlannedStage, Profile, StageSpec

MODEL = ModelRef("m", "", "f")
SHAPE = ModelShape(
    model=MODEL,
    layers=2,
    layer_bytes=(1000, 1000),
    cache_bytes=(100, 100),
    shared=(),
    clean_cuts=(1,),
    unclean=(),
    max_context=10,
    cache_curve=((5, (50, 50)),),
)
STAGES = [PlannedStage(StageSpec(1, i, 2, MODEL, LayerRange(i, i + 1), 10), f"w{i}", 1000, 0) for i in range(2)]
PROFILE = Profile(bandwidth=1e6, layer_s=0.001, step_s=0.0005, row_cost=0.5)
"""One row with five tokens: 0.5 + 1 + (1000 + 50) / 1000 = 2.55 ms."""


def paced(profile: Profile, frames: int, took_us: int, rows: int = 1, context: int = 5) -> StepTimes:
    step_times = StepTimes(SHAPE, STAGES, [profile, profile])
    for _ in range(frames):
        step_times.frame([StageTiming(0, 0, took_us, 0), StageTiming(1, 0, 2 * took_us, 0)], rows, context)
    return step_times


def test_too_few_frames_say_nothing() -> None:
    (first, _) = paced(PROFILE, LEAST_FRAMES - 1, 5100).stages()
    assert (first.frames, first.measured_ms, first.ratio) == (LEAST_FRAMES - 1, 0.0, 0.0)


def test_every_frame_has_its_own_prediction() -> None:
    first, second = paced(PROFILE, LEAST_FRAMES, 5100).stages()
    assert (first.measured_ms, second.measured_ms) == (5.1, 10.2)
    assert (first.expected_ms, first.ratio) == (pytest.approx(2.55), pytest.approx(2.0))
    batch, _ = paced(PROFILE, LEAST_FRAMES, 5100, rows=3, context=10).stages()
    assert batch.expected_ms == pytest.approx(0.5 + 1 + 1 + 2 * 0.5 + 3 * 0.1)


def test_a_correction_changes_what_is_expected_and_not_what_is_learned() -> None:
    first, _ = paced(replace(PROFILE, corrections=(("f", 2.0),)), LEAST_FRAMES, 5100).stages()
    assert first.expected_ms == pytest.approx(5.1)
    assert first.ratio == pytest.approx(2.0)


def test_a_plan_that_counts_on_an_equal_macs_profile_expects_its_times() -> None:
    stages = [replace(stage, decode_ms=1.275) for stage in STAGES]
    step_times = StepTimes(replace(SHAPE, max_context=5), stages, [PROFILE, PROFILE])
    for _ in range(LEAST_FRAMES):
        step_times.frame([StageTiming(0, 0, 1275, 0)], 1, 5)
    first, _ = step_times.stages()
    assert (first.expected_ms, first.ratio) == (pytest.approx(1.275), pytest.approx(0.5))


def test_the_median_of_the_last_frames_counts() -> None:
    step_times = paced(PROFILE, LEAST_FRAMES, 10**9)
    for _ in range(LEARNED_FRAMES):
        step_times.frame([StageTiming(0, 0, 2550, 0), StageTiming(9, 0, 1, 0)], 1, 5)
    assert step_times.stages()[0].ratio == pytest.approx(1.0)


def test_an_unknown_speed_is_measured_and_teaches_nothing() -> None:
    first, _ = paced(Profile(), LEAST_FRAMES, 5100).stages()
    assert (first.measured_ms, first.expected_ms, first.ratio) == (5.1, 0.0, 0.0)
