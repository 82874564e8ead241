"""``ops/bench/watching.py`` measures what it says; how much it is depends on the machine."""

from __future__ import annotations

import pytest

from integration.benches import run_bench

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def test_the_coordinator_is_measured_with_and_without_views() -> None:
    facts = run_bench("watching", "--json", "--rounds", "2", "--seconds", "3", "--users", "2")
    kinds = ("cpu", "memory", "rate")
    assert facts["medians"].keys() == {f"{who}_{kind}" for who in ("alone", "watched") for kind in kinds}
    assert all(value > 0 for value in facts["medians"].values())
    rounds = facts["rounds"]
    ratios = sorted(b / a for a, b in zip(rounds["alone_cpu"], rounds["watched_cpu"], strict=True))
    assert facts["cpu_ratio"] == pytest.approx(sum(ratios) / 2, rel=0.01)
    assert (facts["users"], isinstance(facts["with_page"], bool)) == (2, True)
