"""A leader, a standby, a worker, and pairs of them are killed, stopped and cut off. ``ops/chaos`` plays more seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.coordinator_scenario import Blow, Target, coordinator_scenario, leader_kill
from netns import ROOT, missing

SEEDS = 4


def test_seeds_draw_every_fault_and_pair() -> None:
    drawn = [coordinator_scenario(seed) for seed in range(500)]
    assert drawn[7] == coordinator_scenario(7)
    single = {(one.strikes[0].target, one.strikes[0].blow) for one in drawn if len(one.strikes) == 1}
    assert single == {(target, blow) for target in Target for blow in Blow}
    pairs = {frozenset(strike.target for strike in one.strikes) for one in drawn if len(one.strikes) == 2}
    assert pairs == {frozenset((a, b)) for a in Target for b in Target if a is not b}
    assert all(one.keeps_all for one in drawn if len(one.strikes) == 1)
    assert {one.keeps_all for one in drawn if len(one.strikes) == 2} == {True, False}
    assert {leader_kill(number).strikes[0].target for number in range(10)} == {Target.LEADER}


@pytest.mark.netns
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("faults")
def test_whatever_coordinator_goes_the_promise_is_kept(tmp_path: Path) -> None:
    """In a process of its own, which enters a namespace with all of its threads."""
    if reason := missing():
        pytest.skip(reason)
    words = [sys.executable, "-m", "faults", "--coordinators", "--seeds", str(SEEDS), "--json", "--keep", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    played = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=540)
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout)["seeds"] == SEEDS
