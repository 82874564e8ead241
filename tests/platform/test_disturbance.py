"""A measurement beside other programs, in the heat or of an uneven pace is called disturbed."""

from __future__ import annotations

import pytest

from cluster.platform.disturbance import describe_load, describe_spread, processor_share


def test_a_computing_thread_gets_a_part_of_a_processor() -> None:
    assert 0 < processor_share() <= 1


@pytest.mark.parametrize(
    ("share", "load", "limit", "said"),
    [
        (1.0, 0.3, 100, ""),
        (0.5, 0.3, 100, "other programs left 50% of a processor"),
        (1.0, 9000.0, 100, "9000.0 programs ran on "),
        (1.0, 0.3, 62, "the machine is hot and limits its speed to 62%"),
    ],
)
def test_load_and_heat_are_told(share: float, load: float, limit: int, said: str) -> None:
    told = describe_load(lambda: share, lambda: load, lambda: limit)
    assert told.startswith(said)
    assert bool(told) == bool(said)


def test_an_uneven_pace_is_told() -> None:
    assert describe_spread([(1.0, 1.1, 1.2), (0.1, 0.1, 0.9)]) == "", "one slow round is nothing"
    assert describe_spread([(1.0, 1.1, 1.2), (0.1, 0.3, 0.4)]) == "the same step took 3.0 times as long as the fastest"
    assert describe_spread([]) == ""
