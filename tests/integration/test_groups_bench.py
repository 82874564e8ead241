"""The bench of groups with a small shape on a CPU: every way serves, and tokens differ only where two nearly tie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.benches import run_bench

NEAR = 0.05
"""How far apart two logits in bfloat16 may be that another order of sums makes change places."""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_bench_measures_every_way(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    facts = run_bench(
        "groups",
        *("--shape", "small", "--cpu", "--rounds", "1", "--tokens", "12", "--length", "24", "--context", "128"),
        "--predict",
        *("--folder", str(tmp_path / "run"), "--record", str(record), "--json"),
    )
    ways = {"single", "sharded", "one", "stages", "group"}
    assert set(facts["medians"]) == {f"{what}_{way}" for what in ("decode1", "ttft_24") for way in ways}
    assert all(facts[f"{what}_over_{way}"] > 0 for what in ("decode1", "ttft_24") for way in ways - {"group"})
    for way in ("one", "stages"):
        assert facts[f"first_difference_{way}"]["position"] is None
    assert (facts["first_difference_group"]["logit_gap"] or 0) <= NEAR, "sums in bfloat16 are rounded in another order"
    assert [(one["rank"], one["ranks"]) for one in facts["group"]["held"]] == [(0, 2), (1, 2)]
    assert any("sums of" in reason and "(measured)" in reason for reason in facts["plan"])
    assert facts["sum_us"].keys() == {"16_kib", "1_mib"}
    assert not facts["left_out"]
    assert json.loads(record.read_text()) == facts
