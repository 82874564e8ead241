"""Equal Macs count as equally fast until their frames were measured."""

from __future__ import annotations

from dataclasses import replace

from cluster.coordinator.planner import make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.limits import GIB
from cluster.core.plan import Profile
from cluster.core.worker import WorkerInfo
from cluster.placement.equal_macs import trusted_profiles
from placement.test_propose import shape

FAST = Profile(4e11, 1e-5, 1e-4, 2e13, 0.2)
BUSY = Profile(2.5e10, 4e-4, 3e-3, 1e12, 0.9)
"""The same Mac, measured beside other programs."""


def mac(name: str, profile: Profile, chip: str = "Apple M4 Pro", gpu_cores: int = 20) -> WorkerInfo:
    return WorkerInfo(
        name, name, "", "", "", chip, "gpu", "0.31", 48 * GIB, 36 * GIB, gpu_cores=gpu_cores, profile=profile
    )


def test_a_busy_moment_of_one_of_three_equal_macs_does_not_skew_the_plan() -> None:
    macs = [mac("a", FAST), mac("b", BUSY), mac("c", replace(FAST, bandwidth=3.9e11))]
    plan = make_plan(1, shape(30), macs, LoadOrder("m", worker_count=3))
    assert sorted(len(stage.layers) for stage in plan.stages) == [10, 10, 10]


def test_only_equal_macs_are_taken_for_alike() -> None:
    others = [mac("b", BUSY, chip="Apple M4"), mac("c", BUSY, gpu_cores=16)]
    assert trusted_profiles([mac("a", FAST), *others]) == [FAST, BUSY, BUSY]
    nameless = [mac("a", FAST, chip=""), mac("b", BUSY, chip="")]
    assert trusted_profiles(nameless) == [FAST, BUSY], "nothing says that they are equal"
    unknown = [mac("a", FAST), mac("b", Profile())]
    assert trusted_profiles(unknown) == [FAST, Profile()], "somebody has switched its profile off"


def test_a_mac_whose_frames_were_measured_keeps_its_own_profile() -> None:
    slow = replace(BUSY, corrections=(("f", 1.0),))
    assert trusted_profiles([mac("a", FAST), mac("b", slow)]) == [FAST, slow]


def test_what_frames_say_of_the_fastest_counts_for_those_that_have_had_none() -> None:
    judged = replace(FAST, corrections=(("f", 1.5),))
    same = replace(FAST, bandwidth=3.9e11)
    assert trusted_profiles([mac("a", judged), mac("b", BUSY), mac("c", same)]) == [judged] * 3
    assert trusted_profiles([mac("a", FAST), mac("b", judged)]) == [judged] * 2
