"""Faults of every kind, from seeds, on real daemons: the promise is kept. ``ops/chaos`` runs many more.

More seeds run in one process (``test_simulation``); here each takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import Campaign, complaint

SEEDS = (1, 3, 2, 5)
"""A killed engine, a flipped bit and a drain, then, where workers are announced, two workers that leave."""

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("faults")]


def test_a_hop_is_between_two_stages(campaign: Campaign) -> None:
    """Faults of the link between two stages apply to the connections of that hop."""
    first, second, *_ = campaign.fleet.plan()
    before = campaign.fleet.client.cluster().recoveries
    assert campaign.fleet.proxy.reset(first, second) > 0
    said = campaign.fleet.client.generate([5, 6, 7], max_tokens=20, ignore_eos=True).tokens
    campaign.fleet.mend()
    assert campaign.fleet.client.generate([5, 6, 7], max_tokens=20, ignore_eos=True).tokens == said
    assert campaign.fleet.client.cluster().recoveries == before + 1


def test_whatever_goes_wrong_the_promise_is_kept(campaign: Campaign, tmp_path: Path) -> None:
    outcomes = [campaign.run(seed) for seed in SEEDS]
    broken = [complaint(o, tmp_path) for o in outcomes if not o.kept]
    assert not broken, "\n".join(broken)
