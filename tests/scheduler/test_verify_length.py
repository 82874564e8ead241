"""How many tokens a frame verifies follows what such frames cost, as recorded on devices."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cluster.core.lap_times import LapTimes, mean_token_time
from cluster.scheduler.guess_window import choose_window
from cluster.scheduler.verify_length import choose_depth

Costs = Mapping[int, float]
M5_MAX: Costs = {1: 1.0, 3: 1.11, 5: 1.45, 8: 2.2}
"""A 70B with 4-bit weights."""
M4_PRO: Costs = {1: 1.0, 2: 1.14, 3: 1.35, 4: 1.35, 6: 1.8, 8: 2.2}
"""Single 4-bit matrices, in the middle of what was recorded."""
H200: Costs = {1: 1.0, 2: 2.65, 3: 3.5, 4: 4.3, 5: 5.4, 6: 5.8, 8: 2.5}
"""A 70B with 4-bit weights: from eight rows on another kernel reads the weights once."""
CPU: Costs = {1: 1.0, 2: 1.97, 3: 2.93, 4: 3.86, 8: 7.7}
STEP = 20.0


def steps(costs: Costs, stages: int, hop: float = 0.0) -> dict[int, LapTimes]:
    """The stages share a model equally, so each takes its part of a step."""
    return {tokens: LapTimes((STEP / stages * cost,) * stages, hop) for tokens, cost in costs.items()}


def token_time(times: LapTimes, tokens: int, acceptance: float) -> float:
    return mean_token_time(times, len(times.stages), acceptance, tokens)


def speedup(costs: Costs, stages: int, acceptance: float, hop: float = 0.0) -> tuple[int, float]:
    every = steps(costs, stages, hop)
    window, chosen = choose_depth(every, acceptance, stages)
    return chosen, STEP / mean_token_time(every[chosen], window, acceptance, chosen)


@pytest.mark.parametrize(
    ("costs", "stages", "acceptance", "tokens", "gain"),
    [
        (M5_MAX, 1, 0.7, 3, 1.97),
        (M5_MAX, 1, 0.9, 5, 2.82),
        (M5_MAX, 2, 0.7, 3, 2.38),
        (M5_MAX, 2, 0.9, 5, 3.99),
        (M5_MAX, 4, 0.9, 3, 5.37),
        (M4_PRO, 1, 0.7, 4, 1.88),
        (M4_PRO, 2, 0.9, 4, 3.79),
        (H200, 2, 0.7, 1, 1.54),
        (H200, 2, 0.9, 8, 2.90),
        (CPU, 2, 0.7, 1, 1.54),
        (CPU, 4, 0.9, 1, 3.08),
        (CPU, 1, 0.9, 1, 1.0),
    ],
)
def test_the_choice_follows_the_recorded_costs(
    costs: Costs, stages: int, acceptance: float, tokens: int, gain: float
) -> None:
    chosen, faster = speedup(costs, stages, acceptance)
    assert (chosen, faster) == (tokens, pytest.approx(gain, abs=0.02))


@pytest.mark.parametrize("costs", [M5_MAX, M4_PRO, H200, CPU])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_without_right_guesses_a_frame_verifies_one_token(costs: Costs, stages: int) -> None:
    assert speedup(costs, stages, 0.0) == (1, pytest.approx(1.0))


@pytest.mark.parametrize("costs", [M5_MAX, M4_PRO, H200, CPU])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_the_choice_is_never_slower_than_one_token(costs: Costs, stages: int, acceptance: float) -> None:
    """But for what wrong guesses in frames of their own are taken to cost."""
    one = steps(costs, stages, hop=1.0)[1]
    single = mean_token_time(one, choose_window(one, acceptance, stages), acceptance)
    _, faster = speedup(costs, stages, acceptance, hop=1.0)
    assert faster >= 0.98 * STEP / single


def test_dear_hops_make_longer_frames_worth_while() -> None:
    assert speedup(CPU, 2, 0.9)[0] == 1
    assert speedup(CPU, 2, 0.9, hop=100.0)[0] == 8


def test_frames_of_right_guesses_alone_follow_at_the_pace_of_the_slowest_stage() -> None:
    times = LapTimes((5.0, 15.0))
    assert token_time(times, 4, 1.0) == pytest.approx(15 / 4)
    assert token_time(times, 4, 0.999999) == pytest.approx(15 / 4, rel=1e-3)
