"""Faults of every kind, from seeds, on real daemons: the promise is kept. ``ops/chaos`` plays many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import Campaign, complaint

SEEDS = 10
EACH = 5

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("faults")]


@pytest.mark.parametrize("first", range(0, SEEDS, EACH))
def test_whatever_goes_wrong_the_promise_is_kept(campaign: Campaign, tmp_path: Path, first: int) -> None:
    outcomes = [campaign.run(seed) for seed in range(first, first + EACH)]
    broken = [complaint(o, tmp_path) for o in outcomes if not o.kept]
    assert not broken, "\n".join(broken)
