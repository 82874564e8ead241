"""Load the slices of a plan concurrently, then link the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from cluster.coordinator.concurrent_calls import call_for_each
from cluster.coordinator.group_meeting import GroupMeeting
from cluster.coordinator.ring import RingStage
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import LinkFailed, MacpipeError
from cluster.core.plan import FetchOrder, Link, LoadedStage, LoadProgress, Plan, PlannedStage, Route
from cluster.core.process_groups import GroupPort
from cluster.core.worker import WorkerInfo
from cluster.platform.process import first_error
from cluster.security.trust import worker_of

log = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What a slice may use of its worker: beside the slices of the epochs ``keep``, and ``memory_limit`` bytes.

    A limit of 0 is the worker's own.
    """

    keep: tuple[int, ...] = ()
    memory_limit: int = 0


Claim = Callable[[str, PlannedStage], WorkerShare]
"""Claims a worker, by its control address, for a stage."""


def claim_worker(address: str, stage: PlannedStage) -> WorkerShare:
    """Claim a worker for a stage alone."""
    return WorkerShare()


async def load_slices(
    stages: Sequence[PlannedStage],
    controls: Sequence[WorkerClient],
    orders: Sequence[FetchOrder],
    progress: Progress,
    claim: Claim = claim_worker,
    meetings: Mapping[int, GroupMeeting] = MappingProxyType({}),
) -> tuple[LoadedStage, ...]:
    """Load every slice, once ``claim`` has said what it may use of its worker. Return what is loaded, in order.

    ``meetings`` are those of the stages that are groups. Raises the first error and cancels the other loads.
    """
    loads = zip(stages, controls, orders, strict=True)
    try:
        return tuple(await call_for_each(lambda load: _load(*load, progress, claim, meetings), loads))
    except* MacpipeError as group:
        raise first_error(group) from None


async def _load(
    stage: PlannedStage,
    control: WorkerClient,
    order: FetchOrder,
    progress: Progress,
    claim: Claim,
    meetings: Mapping[int, GroupMeeting],
) -> LoadedStage:
    loaded = LoadedStage(stage.worker, ())
    share = claim(control.address, stage)
    async for p in control.load(stage.spec, order, share.keep, share.memory_limit):
        if isinstance(p, LoadedStage):
            loaded = p
            continue
        if isinstance(p, GroupPort):
            await meetings[stage.spec.index].attend(stage.spec.rank, control, p)
            continue
        total = p.total_bytes or stage.weight_bytes
        done = total if p.state in ("hashing", "ready") else p.done_bytes
        progress(replace(p, worker=stage.worker, done_bytes=done, total_bytes=total))
    return loaded


async def link_stages(
    plan: Plan, workers: Sequence[WorkerInfo], controls: Sequence[WorkerClient]
) -> tuple[RingStage, ...]:
    """Link each stage to the one before it, all concurrently. If a link fails, the coordinator relays that hop.

    Raises the first other error and cancels the other links.
    """
    heads = [worker for stage, worker in zip(plan.stages, workers, strict=True) if stage.spec.rank == 0]

    async def link(i: int) -> tuple[Route, Link | None]:
        spec = plan.stages[i].spec
        before = heads[spec.index - 1] if spec.index and plan.route is Route.DIRECT else None
        return await _link(controls[i], plan.epoch, before, spec.rank)

    try:
        inputs = await call_for_each(link, range(len(controls)))
    except* MacpipeError as group:
        raise first_error(group) from None
    return tuple(
        RingStage(worker.name, worker.data_address, route, worker_of(worker.id), measured, stage.spec.rank)
        for stage, worker, (route, measured) in zip(plan.stages, workers, inputs, strict=True)
    )


async def _link(control: WorkerClient, epoch: int, before: WorkerInfo | None, reader: int) -> tuple[Route, Link | None]:
    """Link a stage. Return the route of its input, and the measured link if it is direct."""
    if before:
        try:
            return Route.DIRECT, await control.link(epoch, before, reader)
        except LinkFailed as e:
            log.warning("link: coordinator relays the hop reason=%s", e.sentence)
    await control.link(epoch, None)
    return Route.RELAY, None
