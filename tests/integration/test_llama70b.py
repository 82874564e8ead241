"""The bench of a 70B-shaped model with a small shape on a CPU: it runs, and both sides produce the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "ops" / "bench" / "llama70b.py"
SMALL = ("--shape", "small", "--cpu", "--rounds", "1", "--tokens", "4", "--context", "128", "--json")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_bench_runs_with_a_small_shape(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), *SMALL, "--folder", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(BENCH.parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["first_difference"]["position"] is None
    assert facts["decode16_over_single"] > 0
    assert {row["worker"] for row in facts["memory"]} == {"a", "b"}
    assert all(row["peak"] > row["slice"] > 0 for row in facts["memory"])
