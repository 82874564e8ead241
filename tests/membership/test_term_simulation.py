"""The product's records, candidates and leaderships under thousands of seeds, with and without its rules."""

from __future__ import annotations

import pytest

from cluster.membership import leadership, term_record
from effort import effort
from membership.term_world import Flaws, Violation, World

SEEDS = effort(300, 10_000, 50)
CALM_SEEDS = effort(60, 2_000, 10)
QUICKLY_FOUND = ("sync", "fence", "sleep", "floor")
"""Rules whose lack is seen within a few hundred seeds. The others need rarer coincidences."""


def test_no_worker_computes_for_two_terms_no_ring_mixes_them_and_who_can_lead_leads() -> None:
    frames = sum(_play(World(seed)) for seed in range(SEEDS))
    assert frames > 10 * SEEDS


def test_a_leader_on_a_busy_machine_is_not_replaced() -> None:
    assert sum(_play(World(seed, calm=True)) for seed in range(CALM_SEEDS)) > 10 * CALM_SEEDS


def test_the_simulation_finds_a_lease_that_is_too_short_for_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term_record, "LEASE_S", 0.9)
    monkeypatch.setattr(leadership, "LEASE_S", 0.9)
    with pytest.raises(Violation, match="replaced"):
        sum(_play(World(seed, calm=True)) for seed in range(400))


def _play(world: World) -> int:
    world.play()
    return world.frames


@pytest.mark.parametrize("flaw", QUICKLY_FOUND)
def test_the_simulation_finds_each_rule_that_is_left_out(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_found(flaw, 400, monkeypatch) is not None


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flaw", [name for name in Flaws.names() if name not in QUICKLY_FOUND])
def test_the_simulation_finds_the_rarer_ones_too(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_found(flaw, 10_000, monkeypatch) is not None


def first_found(flaw: str, seeds: int, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Return the first seed that finds the flaw."""
    if flaw == "margin":
        monkeypatch.setattr(leadership, "LEASE_MARGIN_S", 0.0)
    for seed in range(seeds):
        try:
            World(seed, Flaws(**{flaw: True})).play()
        except Violation:
            return seed
    return None
