"""The benches of a 70B-shaped model with a small shape on a CPU, and of its simulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration.benches import ROOT, run_bench

SMALL = (
    *("--shape", "small", "--cpu", "--rounds", "1", "--tokens", "12", "--users-tokens", "2", "--users", "2", "4"),
    *("--lengths", "8", "16", "--context", "128", "--json"),
)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_bench_runs_with_a_small_shape(stages: int, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    facts = run_bench(
        "llama70b", *SMALL, "--stages", str(stages), "--folder", str(tmp_path / "run"), "--record", str(record)
    )
    assert facts["first_difference"]["position"] is None
    assert facts["tokens_differ"] == 0
    assert not facts["left_out"]
    assert "recoveries" in facts
    ours = {"decode1", "decode1_at_0", "decode1_at_0_7", "decode1_at_0_9", "decode2", "decode4", "ttft_8", "ttft_16"}
    assert all(facts[f"{name}_over_single"] > 0 for name in ours)
    assert ours <= facts["simulated"].keys()
    assert {name: len(taken) for name, taken in facts["rounds"].items() if name in ours} == dict.fromkeys(ours, 1)
    assert {row["worker"] for row in facts["memory"]} == set("abcd"[:stages])
    assert all(row["peak"] > row["slice"] > 0 for row in facts["memory"])
    assert json.loads(record.read_text()) == facts


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_run_that_is_killed_keeps_its_figures(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "ops/bench/llama70b.py"), *SMALL, "--record", str(record)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL) as bench:
        try:
            while "decode1" not in (json.loads(record.read_text())["medians"] if record.exists() else ()):
                assert bench.poll() is None
                time.sleep(0.1)
        finally:
            bench.kill()
    facts = json.loads(record.read_text())
    assert facts["first_difference"]["compared"] == 12
    assert facts["rounds"]["decode1"]


@pytest.mark.long
@pytest.mark.timeout(120)
def test_the_simulation_gives_what_the_formula_does() -> None:
    facts = run_bench("simulated_ring", "--tokens", "400", "--rounds", "1", "--users", "16", "--lengths", "--json")
    assert facts["decode1"] == pytest.approx(1e3 / (4 * 10 + 5 * 0.8), rel=0.01)
    for rate in ("0_7", "0_9"):
        assert facts[f"decode1_at_{rate}"] == pytest.approx(facts[f"formula_at_{rate}"], rel=0.15)
    assert facts["decode16"] == pytest.approx(16e3 / (4 * 10 * (1 + 3 * 0.9)), rel=0.1)
