"""A coordinator that takes over shows the workers that were lost with the leader before, and tells the next leader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.api.coordinator_process import CoordinatorProcess, _describe_service
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.port_settings import HttpPort
from cluster.api.ports import HttpFront
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.lost_workers import KnownWorker
from cluster.coordinator.replicated_service import ReplicatedService
from cluster.coordinator.settings import LoadOrder, ModelEntry, ServeSettings
from cluster.core.cluster_state import ClusterState
from cluster.discovery.static import static_source
from cluster.membership.leadership import Leadership
from cluster.membership.terms import Process, Term
from cluster.security.credentials import LocalTrust
from cluster.standby.standby import Succession
from cluster.store.store import Store

SILENT = "127.0.0.1:1"
"""Nobody listens there."""
ADA = KnownWorker("1" * 16, "ada", SILENT)
SERVICE = ReplicatedService((ModelEntry("default", LoadOrder("m")),), workers=(SILENT,), known=(ADA,))


def shown(state: ClusterState) -> list[tuple[str, str, bool]]:
    return [(worker.name, worker.standing, worker.reachable) for worker in state.workers]


@pytest.mark.anyio
async def test_a_worker_that_was_lost_with_the_leader_before_is_shown_by_its_name_and_told_on(tmp_path: Path) -> None:
    settings = ServeSettings(LoadOrder("m"), tmp_path, cluster="lab", port=0)
    port = HttpPort(OriginPolicy(), None, None)
    process = CoordinatorProcess.create(settings, static_source(()), LocalTrust(), port, HttpFront())
    roster = process.create_roster("id", SERVICE)
    roster.silent = roster.addresses()  # as its election found
    leadership = Leadership(Term(4, Process("id", roster.instance)), {}, bool, lambda: 0.0)
    parts: Any = (roster, leadership, SERVICE, 7, True, None)
    roster = process.begin("id", EpochNumbers(), Succession(*parts))
    nothing: Any = None
    coordinator = Coordinator("lab", roster, nothing, nothing, Store(tmp_path))
    try:
        assert shown(await coordinator.snapshot()) == [("ada", "gone", False)]
        assert [worker.name for worker in coordinator.known_workers()] == ["ada"]
        assert _describe_service(settings, coordinator, roster, ()).known == (ADA,)
    finally:
        await coordinator.close()
