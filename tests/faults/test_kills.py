"""SIGKILL of each stage at token after token, with one stream and with eight, with a spare and without.

``ops/chaos --kills`` runs the same, and prints how long detection and recovery take.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.campaign import Campaign, Summary, complaint
from faults.fleet import NAMES, Fleet
from faults.scenario import KILLS, TOKENS, Kind, kill, pool

pytestmark = [pytest.mark.timeout(3600)]
FLEETS = [
    pytest.param(NAMES, id="spare", marks=pytest.mark.xdist_group("kills, spare")),
    pytest.param(NAMES[:-1], id="no spare", marks=pytest.mark.xdist_group("kills, no spare")),
]


@pytest.fixture(scope="module", params=FLEETS)
def fleets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), names=request.param)
    try:
        yield Campaign(fleet)
    finally:
        fleet.close()


def test_every_stage_is_killed_at_every_token_alone_and_among_eight() -> None:
    played = [kill(number, pool(700)) for number in range(KILLS)]
    assert {(s.faults[0].stage, s.faults[0].token, len(s.requests)) for s in played} == {
        (stage, token, streams) for stage in range(3) for token in range(TOKENS) for streams in (1, 8)
    }
    assert {s.faults[0].kind for s in played} == {Kind.KILL_ENGINE, Kind.KILL_WORKER}
    assert all(pool(700)[r].max_tokens > s.faults[0].token for s in played for r in s.requests)


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, KILLS, TOKENS))
def test_a_kill_at_every_token(fleets: Campaign, tmp_path: Path, first: int) -> None:
    summary, broken = Summary(), []
    for number in range(first, first + TOKENS):
        outcome = fleets.play(kill(number, fleets.asked))
        summary.add(outcome)
        if not outcome.kept:
            broken.append(complaint(outcome, tmp_path))
    print(json.dumps(summary.facts()))
    assert not broken, "\n".join(broken)
