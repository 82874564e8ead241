"""The bench beside mlx-lm's own pipeline: it runs with a small model, and everything is measured once."""

from __future__ import annotations

import pytest

from integration.benches import run_bench

SMALL = ("--width", "64", "--layers", "2", "--rounds", "3", "--seconds", "0", "--json")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_bench_ends_after_its_seconds_with_every_figure() -> None:
    facts = run_bench("mlx_pipeline", *SMALL)
    assert len(facts["rounds"]) == 6
    assert all(len(values) == 1 and values[0] > 0 for values in facts["rounds"].values())
    assert all(facts[f"{load}_over_mlx_lm"] > 0 for load in ("one_user", "eight_users", "first_token"))
