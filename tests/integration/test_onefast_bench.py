"""The bench of guesses for one user: it runs with a small model, and no token differs."""

from __future__ import annotations

import pytest

from integration.benches import run_bench

SMALL = ("--width", "256", "--layers", "2", "--tokens", "40", "--rounds", "2", "--json")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_guesses_change_no_token_over_real_daemons() -> None:
    facts = run_bench("onefast", *SMALL)
    assert facts["tokens_differ"] == 0
    assert {name: len(values) for name, values in facts["rounds"].items()} == {"off": 2, "0": 2, "0_7": 2, "0_9": 2}
    assert all(facts[f"{kind}_{rate}"] > 0 for kind in ("speedup", "formula") for rate in ("0", "0_7", "0_9"))
