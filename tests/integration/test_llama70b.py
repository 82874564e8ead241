"""The bench of a 70B-shaped model with a small shape on a CPU: it runs, and both sides produce the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.benches import run_bench

SMALL = ("--shape", "small", "--cpu", "--rounds", "1", "--tokens", "4", "--context", "128", "--json")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_bench_runs_with_a_small_shape(tmp_path: Path) -> None:
    facts = run_bench("llama70b", *SMALL, "--folder", str(tmp_path))
    assert facts["first_difference"]["position"] is None
    assert facts["decode16_over_single"] > 0
    assert {row["worker"] for row in facts["memory"]} == {"a", "b"}
    assert all(row["peak"] > row["slice"] > 0 for row in facts["memory"])
