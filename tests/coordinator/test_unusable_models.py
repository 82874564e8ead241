"""Which of a model's faults is named first."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from checkpoints import make
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.offline_planner import _NullReporter
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import BadCheckpoint, DoesNotFit, MacpipeError
from cluster.core.limits import GIB
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust
from cluster.store.store import Store
from coordinator.test_roster import ADA, Telling


@pytest.mark.parametrize(("memory_limit", "first"), [(1, DoesNotFit), (8 * GIB, BadCheckpoint)])
def test_a_model_that_does_not_fit_is_not_first_blamed_for_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_limit: int, first: type[MacpipeError]
) -> None:
    model = make("llama", tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    worker = Telling(replace(ADA, memory_total=8 * GIB, memory_limit=memory_limit))
    roster = Roster(static_source([ADA.control_address]), "c", "me", LocalTrust())
    monkeypatch.setattr(roster, "control", lambda address: worker)
    monkeypatch.setattr("cluster.coordinator.roster.SETTLE_S", 0.05)

    async def load() -> None:
        coordinator = Coordinator("c", roster, cast(Any, None), _NullReporter(), Store(tmp_path / "home"))
        try:
            await coordinator.load(LoadOrder(str(model), wait_s=1.0))
        finally:
            await coordinator.close()

    with pytest.raises(first):
        asyncio.run(load())
