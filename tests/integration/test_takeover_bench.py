"""``ops/bench/takeover.py`` kills a leader in mid-answer; how long that takes depends on the machine."""

from __future__ import annotations

import pytest

from integration.benches import run_bench

STEPS = ("notices", "stands", "is_elected", "listens", "serves", "token")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_step_from_a_leaders_death_to_the_next_token_is_measured() -> None:
    facts = run_bench("takeover", "--json", "--rounds", "2")
    rounds = facts["rounds"]
    assert rounds.keys() == {*STEPS, "pause"}
    for number, pause_s in enumerate(rounds["pause"]):
        assert pause_s == pytest.approx(sum(rounds[step][number] for step in STEPS), abs=0.01)
    assert facts["pause_p99"] <= max(rounds["pause"])
    assert len(facts["load"]) == 2
