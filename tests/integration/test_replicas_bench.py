"""The bench of several copies: it measures all ways to serve, and conversations stay where their prefix is kept."""

from __future__ import annotations

import pytest

from integration.benches import run_bench

SMALL = (
    "--width",
    "256",
    "--tokens",
    "6",
    "--rounds",
    "1",
    "--at",
    "1000",
    "--turns",
    "3",
    "--sessions",
    "1",
    "--json",
)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_copies_are_measured_beside_other_ways_and_sessions_stay_with_their_copy() -> None:
    facts = run_bench("replicas", *SMALL)
    assert set(facts["medians"]) == {"copies", "one", "stages", "independent", "routed_share", "random_share"}
    assert all(facts[f"over_{way}"] > 0 for way in ("one", "stages", "independent"))
    assert facts["cached_share"] >= 0.95 > facts["random_cached_share"]
