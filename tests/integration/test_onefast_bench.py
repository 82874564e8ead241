"""The bench of guesses for one user: it runs with a small model, and no token differs."""

from __future__ import annotations

import pytest

from integration.benches import run_bench

SMALL = ("--width", "256", "--layers", "2", "--tokens", "40", "--rounds", "2", "--json")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_guesses_change_no_token_over_real_daemons() -> None:
    facts = run_bench("onefast", *SMALL)
    assert (facts["tokens_differ"], facts["rows"]) == (0, 0)
    assert {name: len(values) for name, values in facts["rounds"].items()} == {"off": 2, "0": 2, "0_7": 2, "0_9": 2}
    assert all(facts[f"{kind}_{rate}"] > 0 for kind in ("speedup", "formula") for rate in ("0", "0_7", "0_9"))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_rows_change_no_token_of_a_float32_model_over_real_daemons() -> None:
    """Each guessed frame has three tokens."""
    facts = run_bench("onefast", *SMALL, "--rows", "3")
    assert facts["tokens_differ"] == 0
    assert facts["rows"] > 20
