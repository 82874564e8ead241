"""A leader, a standby, a worker, and pairs of them are killed, stopped and cut off. ``ops/chaos`` plays more seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.coordinator_campaign import CoordinatorCampaign
from faults.coordinator_fleet import CoordinatorFleet
from faults.coordinator_games import CoordinatorSummary
from faults.coordinator_scenario import (
    PAIRS,
    Blow,
    CoordinatorScenario,
    Course,
    Strike,
    Target,
    coordinator_scenario,
    leader_kill,
)
from faults.hosts import loopback_hosts
from netns import ROOT, missing

SEEDS = 4


def test_seeds_draw_every_fault_and_pair() -> None:
    drawn = [coordinator_scenario(seed) for seed in range(500)]
    assert drawn[7] == coordinator_scenario(7)
    single = {one.kind for one in drawn if one.course is Course.SINGLE}
    assert single == {f"{blow} {target}" for target in Target for blow in Blow}
    for course in (Course.RESTART, Course.PAIR, Course.LOST_PAIR):
        hit = {tuple(strike.target for strike in one.strikes) for one in drawn if one.course is course}
        assert hit == set(PAIRS)
    restarts = [one.strikes for one in drawn if one.course is Course.RESTART]
    assert {(s.blow, s.after_s) for strikes in restarts for s in strikes} == {(Blow.KILL, 0.0)}
    assert {s.back_s is None for one in drawn if not one.keeps_all for s in one.strikes} == {True}
    assert {leader_kill(number).strikes[0].target for number in range(10)} == {Target.LEADER}


def test_without_cables_nothing_is_cut() -> None:
    blows = [blow for blow in Blow if blow is not Blow.CUT]
    drawn = [coordinator_scenario(seed, blows) for seed in range(200)]
    assert {strike.blow for one in drawn for strike in one.strikes} == {*blows}


def test_a_summary_says_by_kind_how_long_answers_paused() -> None:
    played = {"requests": 1, "lost": [], "hung": [], "differing": [], "ended": [], "refused": []}
    summary = CoordinatorSummary(
        [
            played | {"seed": 1, "kind": "kill leader", "resume_ms": 4000.0},
            played | {"seed": 2, "kind": "kill leader", "resume_ms": 6000.0},
            played | {"seed": 3, "kind": "stop worker", "resume_ms": None},
            played | {"seed": 4, "kind": "cut leader", "resume_ms": 9000.0, "lost": ["c4-0: NOT_FOUND"]},
        ],
        unmended=[5],
    )
    assert not summary.good
    assert not CoordinatorSummary(unplayed=5).good, "nothing was shown"
    assert CoordinatorSummary(summary.outcomes[:3]).good
    facts = summary.facts()
    assert facts["resume_ms"] == {"p50": 6000.0, "p99": 9000.0, "n": 3}
    assert facts["resume_ms_by_kind"] == {
        "cut leader": {"p50": 9000.0, "p99": 9000.0, "n": 1},
        "kill leader": {"p50": 5000.0, "p99": 6000.0, "n": 2},
        "stop worker": {},
    }
    assert (facts["lost"], facts["failed_seeds"]) == (1, [4, 5])


@pytest.fixture
def campaign(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CoordinatorCampaign]:
    """Macs on loopback, whose ring has as many stages as the test's parameter."""
    if sys.platform != "linux":
        pytest.skip("needs loopback addresses beside 127.0.0.1, and /proc")
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path))
    with loopback_hosts(3) as hosts:
        fleet = CoordinatorFleet(tmp_path, hosts, stages=request.param)
        try:
            yield CoordinatorCampaign(fleet)
        finally:
            fleet.close()


def kill_at_once(campaign: CoordinatorCampaign, seed: int, pair: tuple[Target, Target], *back_s: float | None) -> None:
    """Kill two processes in mid-answer, which start again so many seconds later, if ever. Require what was accepted."""
    strikes = tuple(Strike(target, Blow.KILL, 0.0, s) for target, s in zip(pair, back_s, strict=True))
    outcome = campaign.play(CoordinatorScenario(seed, (0, 1, 2, 3), 10, Course.RESTART, strikes))
    assert outcome.kept, json.dumps(outcome.facts())
    assert outcome.verdict.requests + len(outcome.refused) == 4, "who was not accepted yet may be told to try again"
    assert outcome.verdict.requests


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("campaign", [2], indirect=True)
def test_two_processes_that_die_at_once_and_start_again_with_their_disks_lose_no_answer(
    campaign: CoordinatorCampaign,
) -> None:
    for seed, pair in enumerate(PAIRS):
        kill_at_once(campaign, seed, pair, 1.0, 4.0)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("campaign", [1], indirect=True)
def test_answers_go_on_over_a_spare_after_the_leader_and_the_whole_ring_are_gone(campaign: CoordinatorCampaign) -> None:
    kill_at_once(campaign, 0, (Target.LEADER, Target.WORKER), None, None)


@pytest.mark.netns
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("faults")
def test_whatever_coordinator_goes_the_promise_is_kept(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    play(SEEDS, tmp_path)


def play(seeds: int, folder: Path, *more: str) -> None:
    """Run ``ops/chaos``, whose fleets are processes of their own: each enters a namespace with all of its threads."""
    words = [sys.executable, "-m", "faults", "--coordinators", "--seeds", str(seeds), "--json", "--keep", str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    played = subprocess.run(
        [*words, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=540
    )
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout)["seeds"] == seeds
