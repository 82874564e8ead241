"""Faults of every kind, from seeds, on real daemons: the promise is kept. ``ops/chaos`` plays many more.

Further seeds are played in one process (``test_simulation``): here each takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import Campaign, complaint

SEEDS = 5

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("faults")]


def test_whatever_goes_wrong_the_promise_is_kept(campaign: Campaign, tmp_path: Path) -> None:
    outcomes = [campaign.run(seed) for seed in range(SEEDS)]
    broken = [complaint(o, tmp_path) for o in outcomes if not o.kept]
    assert not broken, "\n".join(broken)
