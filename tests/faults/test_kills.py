"""SIGKILL of each stage at token after token, with one stream and with eight; with a spare, and with none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.campaign import Campaign, Summary, complaint
from faults.fleet import Fleet
from faults.scenario import Fault, Kind, Moment, Scenario

pytestmark = [pytest.mark.timeout(3600), pytest.mark.long, pytest.mark.xdist_group("faults")]
TOKENS = 50


@pytest.fixture(scope="module", params=[4, 3], ids=["spare", "no spare"])
def fleets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), names=("ada", "bob", "cyd", "dee")[: request.param])
    try:
        yield Campaign(fleet)
    finally:
        fleet.close()


@pytest.mark.parametrize("kind", [Kind.KILL_ENGINE, Kind.KILL_WORKER])
@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_kill_at_every_token(fleets: Campaign, tmp_path: Path, kind: Kind, streams: int, stage: int) -> None:
    longest = max(range(len(fleets.asked)), key=lambda i: fleets.asked[i].max_tokens)
    summary, broken = Summary(), []
    for at in range(TOKENS):
        others = tuple((at + i) % len(fleets.asked) for i in range(1, streams))
        played = Scenario(at, (longest, *others), (0.0,) * streams, (Fault(kind, stage, Moment.TOKEN, at, True),))
        outcome = fleets.play(played)
        summary.add(outcome)
        if not outcome.kept:
            broken.append(complaint(outcome, tmp_path))
    print(json.dumps(summary.facts()))
    assert not broken, "\n".join(broken)
