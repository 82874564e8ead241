"""Equal Macs count as equally fast until their frames were measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.planner import make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.limits import CORRECTION_BOUND, GIB
from cluster.core.plan import Objective, Profile
from cluster.core.worker import WorkerInfo
from cluster.placement.equal_macs import trusted_profiles
from placement.test_propose import shape

FAST = Profile(4e11, 1e-5, 1e-4, 2e13, 0.2)
BUSY = Profile(2.5e10, 4e-4, 3e-3, 1e12, 0.9)
"""The same Mac, measured beside other programs."""
MODEL = shape(30)


def mac(name: str, profile: Profile, chip: str = "Apple M4 Pro", gpu_cores: int = 20, gib: int = 48) -> WorkerInfo:
    return WorkerInfo(
        name, name, "", "", "", chip, "gpu", "0.31", gib * GIB, 36 * GIB, gpu_cores=gpu_cores, profile=profile
    )


def corrected(profile: Profile, ratio: float) -> Profile:
    return replace(profile, corrections=(("f", ratio),))


def cut(*macs: WorkerInfo, objective: Objective = Objective.LATENCY, layers: int = 30) -> list[int]:
    """Return how many layers each of the Macs gets if all are used."""
    plan = make_plan(1, shape(layers), macs, LoadOrder("m", worker_count=len(macs), objective=objective))
    by_name = {stage.worker: len(stage.layers) for stage in plan.stages}
    return [by_name[one.name] for one in macs]


def test_a_busy_moment_of_one_of_three_equal_macs_does_not_skew_the_plan() -> None:
    macs = [mac("a", FAST), mac("b", BUSY), mac("c", replace(FAST, bandwidth=3.9e11))]
    assert cut(*macs) == [10, 10, 10]


def test_the_fastest_of_equal_macs_is_the_one_that_computes_the_model_fastest() -> None:
    """A disturbed measurement can find too much bandwidth, and too long a start."""
    odd = replace(FAST, bandwidth=5e11, step_s=0.1)
    assert trusted_profiles(MODEL, [mac("a", odd), mac("b", FAST)]) == [FAST, FAST]


def test_only_equal_macs_are_taken_for_alike() -> None:
    others = [mac("b", BUSY, chip="Apple M4"), mac("c", BUSY, gpu_cores=16)]
    assert trusted_profiles(MODEL, [mac("a", FAST), *others]) == [FAST, BUSY, BUSY]
    nameless = [mac("a", FAST, chip=""), mac("b", BUSY, chip="")]
    assert trusted_profiles(MODEL, nameless) == [FAST, BUSY], "nothing says that they are equal"
    unknown = [mac("a", FAST), mac("b", Profile())]
    assert trusted_profiles(MODEL, unknown) == [FAST, Profile()], "somebody has switched its profile off"


def test_a_mac_whose_frames_were_measured_keeps_its_own_profile() -> None:
    slow = corrected(BUSY, 1.0)
    assert trusted_profiles(MODEL, [mac("a", FAST), mac("b", slow)]) == [FAST, slow]


def test_what_frames_say_of_the_fastest_counts_for_those_that_have_had_none() -> None:
    judged = corrected(FAST, 1.5)
    same = replace(FAST, bandwidth=3.9e11)
    assert trusted_profiles(MODEL, [mac("a", judged), mac("b", BUSY), mac("c", same)]) == [judged] * 3
    assert trusted_profiles(MODEL, [mac("a", FAST), mac("b", judged)]) == [judged] * 2


def test_a_correction_at_its_bound_does_not_keep_a_mac_apart() -> None:
    bound = corrected(BUSY, 1 / CORRECTION_BOUND)
    assert trusted_profiles(MODEL, [mac("a", corrected(FAST, 1.1)), mac("b", bound)]) == [corrected(FAST, 1.1)] * 2


@pytest.mark.parametrize("ratios", [(0.72, 0.79, 0.72), (1.0, 0.8, 1.05), (1.2, 1.0, 1.3)])
def test_equal_macs_share_evenly_though_their_frames_differ_a_little(ratios: tuple[float, ...]) -> None:
    macs = [mac(name, corrected(FAST, ratio)) for name, ratio in zip("abc", ratios, strict=True)]
    assert cut(*macs) == [10, 10, 10]
    assert cut(*macs[:2]) == [15, 15], "so it stays when one is lost"
    plan = make_plan(1, MODEL, [replace(m, memory_limit=96 * GIB) for m in macs], LoadOrder("m", worker_count=1))
    assert plan.stages[0].worker == macs[ratios.index(min(ratios))].name, "one alone is the fastest"


def test_equal_macs_that_were_measured_while_busy_share_evenly_once_their_frames_have_corrected_that() -> None:
    profiles = [corrected(FAST, 1.1), corrected(replace(FAST, bandwidth=2e11), 0.55), replace(FAST, bandwidth=3.5e11)]
    assert cut(*map(mac, "abc", profiles)) == [10, 10, 10]


def test_equal_macs_share_evenly_though_disturbed_profiles_divide_their_time_in_other_ways() -> None:
    """One found a long start and fast layers, another the contrary; their frames took about the same time."""
    long_start = corrected(replace(FAST, bandwidth=5e11, step_s=0.008), 1.9)
    slow_layers = corrected(replace(FAST, bandwidth=3.4e11, step_s=0.0), 1.84)
    macs = [mac("a", long_start), mac("b", slow_layers), mac("c", long_start)]
    assert cut(*macs) == [10, 10, 10]
    assert cut(*macs[:2]) == [15, 15]


def test_macs_of_other_hardware_share_evenly_within_the_noise_of_measurements() -> None:
    small = mac("b", replace(FAST, bandwidth=3.75e11), gib=64)
    assert cut(mac("a", FAST), small) == [15, 15]
    assert cut(mac("a", FAST), replace(small, profile=replace(FAST, bandwidth=3.3e11))) == [27, 3]


def test_different_macs_and_equal_ones_that_proved_much_slower_keep_an_uneven_cut() -> None:
    m1 = mac("m1", Profile(6.8e10, 1e-5, 1e-4, 2.6e12, 0.2), chip="Apple M1", gpu_cores=8)
    m4 = mac("m4", Profile(1.2e11, 1e-5, 1e-4, 4e12, 0.2), chip="Apple M4", gpu_cores=10)
    assert cut(m4, m1) == [29, 1]
    assert cut(m4, m1, objective=Objective.THROUGHPUT) == [19, 11]
    fast, throttled = mac("a", corrected(FAST, 1.0)), mac("b", corrected(FAST, 1.6))
    assert cut(fast, throttled) == [28, 2]
    assert cut(fast, throttled, objective=Objective.THROUGHPUT) == [19, 11]
