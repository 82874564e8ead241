"""Plan without a running coordinator, for assumed Macs or for the workers found now. Loads nothing."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.joint_planner import ModelToPlace, plan_models, require_models
from cluster.coordinator.model_reader import read_order_shape
from cluster.coordinator.planner import explain_exposure, plan_over
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import NoPlan
from cluster.core.joint_plan import JointPlan
from cluster.core.plan import LoadProgress, ModelShape, Plan, Route
from cluster.core.worker import WorkerInfo
from cluster.discovery.browse import browse
from cluster.discovery.static import merge_sources, static_source
from cluster.model.device import close_thread
from cluster.placement.candidates import Candidates
from cluster.placement.chips import assumed_workers, assumption
from cluster.placement.group_choice import list_equal, list_sizes
from cluster.security.credentials import open_trust
from cluster.security.trust import ADMIN
from cluster.store.store import Store
from cluster.transport.grpc_streams import GrpcDialer

__all__ = ["plan_for", "plan_models_for", "plan_models_over_found", "plan_over_found"]


def plan_for(order: LoadOrder, macs: str, home: Path) -> Plan:
    """Return the plan for assumed Macs, in the syntax of ``placement.chips.assumed_workers``.

    Call it on a thread that ends afterwards, since it closes the thread's MLX streams. For a model of the hub, fetch
    small files and headers into ``home``. Raises ``NoPlan`` if ``macs`` names fewer Macs than the order asks for.
    """
    order.check()
    candidates = assumed_workers(macs, relay=order.route is Route.RELAY)
    _require_count(order, candidates)
    (shape,) = _read_shapes([order], home, list_sizes(list_equal(candidates)) if candidates.sums else ())
    plan = explain_exposure(plan_over(0, shape, candidates, order))
    return replace(plan, reasons=(assumption(candidates), *plan.reasons))


def plan_models_for(entries: Sequence[ModelEntry], macs: str, home: Path) -> JointPlan:
    """Return the plans of several models for assumed Macs. Call it as ``plan_for``. Raises its errors too."""
    require_models([entry.name for entry in entries])
    candidates = assumed_workers(macs)
    for entry in entries:
        entry.order.check()
        _require_count(entry.order, candidates)
    shapes = _read_shapes([entry.order for entry in entries], home)
    models = [ModelToPlace.of(entry, shape) for entry, shape in zip(entries, shapes, strict=True)]
    made = plan_models(models, lambda _, order: replace(candidates, relay=order.route is Route.RELAY), explain_exposure)
    return replace(made, reasons=(assumption(candidates), *made.reasons))


def _require_count(order: LoadOrder, candidates: Candidates) -> None:
    if order.worker_count and order.worker_count > len(candidates.workers):
        raise NoPlan(f"{order.worker_count} workers were asked for, but --assume names {len(candidates.workers)}")


def _read_shapes(orders: Sequence[LoadOrder], home: Path, possible_ranks: Collection[int] = ()) -> list[ModelShape]:
    store = Store(home)
    try:
        return [read_order_shape(store.find_by_name(order.model).folder, order, possible_ranks) for order in orders]
    finally:
        close_thread()


async def plan_over_found(order: LoadOrder, cluster: str, peers: Sequence[str], home: Path) -> Plan:
    """Return the plan for the workers of a cluster that answer now. Raises ``NoWorkers`` if none does."""
    async with _temporary_coordinator(cluster, peers, home) as coordinator:
        return await coordinator.plan(order, wait=True)


async def plan_models_over_found(
    entries: Sequence[ModelEntry], cluster: str, peers: Sequence[str], home: Path
) -> JointPlan:
    """Return the plans of several models for the workers that answer now. Raises as ``plan_over_found``."""
    async with _temporary_coordinator(cluster, peers, home) as coordinator:
        return await coordinator.joint_planner.plan_models(entries, wait=True)


@asynccontextmanager
async def _temporary_coordinator(cluster: str, peers: Sequence[str], home: Path) -> AsyncIterator[Coordinator]:
    async with browse(cluster) as source:
        trust = open_trust(home, cluster, ADMIN)
        roster = Roster(merge_sources(static_source(peers), source), cluster, secrets.token_hex(8), trust)
        coordinator = Coordinator(cluster, roster, GrpcDialer(trust), _NullReporter(), Store(home))
        try:
            yield coordinator
        finally:
            await coordinator.close()


class _NullReporter:
    """A reporter that ignores all events."""

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None: ...

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None: ...

    def serving(self, addresses: Sequence[str], plan: Plan, http: str, names: Sequence[str] = ()) -> None: ...

    def problem(self, sentence: str) -> None: ...
