"""Faults from seeds on simulated Macs, beside those of real daemons: recovery keeps the promise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from faults.simulation import SPEED, simulated

pytestmark = pytest.mark.timeout(240)
FIRST, SEEDS = 5, 55


def test_whatever_goes_wrong_in_the_simulation_the_promise_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in SPEED.items():
        monkeypatch.setattr(name, seconds)
    outcomes = asyncio.run(simulated(range(FIRST, FIRST + SEEDS)))
    broken = []
    for seed, (verdict, history) in outcomes.items():
        if not verdict.kept:
            history.save(tmp_path / f"seed-{seed}.jsonl")
            broken.append(f"seed {seed}: {verdict}; history in {tmp_path}")
    assert not broken, "\n".join(broken)
    assert sum(verdict.requests for verdict, _ in outcomes.values()) >= SEEDS
