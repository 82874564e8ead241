"""The arithmetic of ``macpipe bench``, on invented arrivals whose figures can be computed by hand."""

from __future__ import annotations

import pytest

from cluster.cli.bench import parse_users
from cluster.cli.throughput import (
    Arrivals,
    StageActivity,
    StageTime,
    bubble_share,
    p99,
    prefill_rate,
    roofline,
    stage_times,
    turn,
    wall,
)
from cluster.core.errors import InvalidOption
from cluster.core.plan import LayerRange
from cluster.core.request import StageFigures

FIRST, SECOND = LayerRange(0, 4), LayerRange(4, 8)


def answer(asked_at: float, *tokens_at: float, prompt: int = 100, cached: int = 0, compute: float = 0.0) -> Arrivals:
    stages = (
        StageFigures("ada", FIRST, compute_ms=compute, wire_ms=0.5, wait_ms=1.0),
        StageFigures("bob", SECOND, compute_ms=2 * compute, wire_ms=0.5, wait_ms=0.0),
    )
    return Arrivals(asked_at, tokens_at, prompt, cached, stages)


def test_the_rate_of_all_is_tokens_over_the_wall_time_of_all() -> None:
    """Two users who are served one after the other are no faster than one, whatever each of them measured."""
    quick = answer(0.0, 0.1, 0.2, 0.3, 0.4)
    late = answer(0.0, 0.7, 0.8, 0.9, 1.0)
    found = turn([[quick, late]])
    assert (found.tokens, found.wall_seconds) == (8, 1.0)
    assert found.tokens_per_second == pytest.approx(8.0)
    assert found.ttft_p50_ms == pytest.approx(400.0)
    assert found.ttft_max_ms == pytest.approx(700.0)
    assert found.tpot_p50_ms == pytest.approx(100.0)


def test_wall_time_begins_with_the_first_question() -> None:
    assert wall([answer(5.0, 6.0, 7.0), answer(4.5, 5.0, 5.5)]) == pytest.approx(2.5)


def test_rounds_add_up_without_the_time_between_them() -> None:
    found = turn([[answer(0.0, 0.5, 1.0)], [answer(100.0, 101.0, 103.0)]])
    assert (found.tokens, found.wall_seconds) == (4, pytest.approx(4.0))
    assert found.tokens_per_second == pytest.approx(1.0)
    assert found.tpot_p50_ms == pytest.approx(1250.0)


def test_gaps_are_within_an_answer_and_the_p99_sees_one_in_a_hundred() -> None:
    steady = [0.01 * i for i in range(201)]
    assert turn([[answer(0.0, *steady)]]).tpot_p99_ms == pytest.approx(10.0)
    bumpy = [*steady, *(2.5 + 0.01 * i for i in range(1, 6)), 3.0, 3.5, 4.0]
    assert turn([[answer(0.0, *bumpy)]]).tpot_p99_ms > 400
    assert p99([7.0]) == 7.0
    assert p99([float(i) for i in range(101)]) == pytest.approx(99.0)


def test_kept_prompts_are_told() -> None:
    found = turn([[answer(0.0, 0.1, 0.2, prompt=100, cached=98), answer(0.0, 0.1, 0.2, prompt=100)]])
    assert found.kept_share == pytest.approx(0.49)


def test_prefill_counts_what_was_read_anew_up_to_the_first_token() -> None:
    alone = [answer(0.0, 0.5), answer(10.0, 10.25), answer(20.0, 20.5, cached=50)]
    assert prefill_rate(alone) == pytest.approx(200.0)


def test_a_tokens_time_on_each_stage_leaves_out_answers_that_read_their_prompt() -> None:
    kept = answer(0.0, 0.1, 0.2, 0.3, 0.4, cached=97, compute=8.0)
    read = answer(0.0, 0.1, 0.2, 0.3, 0.4, cached=0, compute=500.0)
    before, after = (
        [StageActivity(1.0, 2.0), StageActivity(1.0, 2.0)],
        [StageActivity(1.25, 3.0), StageActivity(1.5, 3.0)],
    )
    ada, bob = stage_times([[kept, read]], [(before, after)])
    assert ada == StageTime("ada", FIRST, 2.0, 0.125, 0.25, 0.75)
    assert bob == StageTime("bob", SECOND, 4.0, 0.125, 0.0, 0.5)


def test_what_is_not_known_is_none() -> None:
    ada, bob = stage_times([[answer(0.0, 0.1, 0.2, compute=500.0)]], [([], [])])
    assert ada == StageTime("ada", FIRST, None, None, None, None)
    line = roofline(bob, weight_bytes=10**9, bandwidth=0.0, predicted_ms=0.0)
    assert (line.floor_ms, line.share, line.bandwidth, line.predicted_ms, line.measured_ms) == (None,) * 5


def test_bubbles_are_of_the_time_between_two_looks() -> None:
    assert (
        bubble_share([(StageActivity(10, 20), StageActivity(11, 24)), (StageActivity(50, 60), StageActivity(52, 62))])
        == 0.5
    )
    assert bubble_share([(StageActivity(10, 20), StageActivity(10, 20))]) is None
    assert bubble_share([(StageActivity(10, 20), StageActivity(1, 2))]) is None, "another load in between"


def test_the_roofline_is_the_time_to_read_the_weights() -> None:
    measured = StageTime("ada", FIRST, 25.0, 0.5, 0.0, 0.5)
    line = roofline(measured, weight_bytes=8 * 10**9, bandwidth=4e11, predicted_ms=22.0)
    assert line.floor_ms == pytest.approx(20.0)
    assert line.share == pytest.approx(0.8)
    assert (line.predicted_ms, line.measured_ms) == (22.0, 25.0)


def test_users_are_written_as_a_list() -> None:
    assert parse_users("4, 1,2,4") == (1, 2, 4)
    for wrong in ("", "one", "1;2", "-1", "0", "1,257", "1.5"):
        with pytest.raises(InvalidOption):
            parse_users(wrong)
