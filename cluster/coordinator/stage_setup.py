"""Load the slices of a plan concurrently, then link the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import anyio

from cluster.coordinator.ring import RingStage
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import LinkFailed, MacpipeError
from cluster.core.plan import FetchOrder, Link, LoadProgress, Plan, PlannedStage, Route, StageDigests
from cluster.core.worker import WorkerInfo
from cluster.platform.process import first_error
from cluster.security.trust import worker_of

log = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]


async def load_slices(
    stages: Sequence[PlannedStage],
    controls: Sequence[WorkerClient],
    orders: Sequence[FetchOrder],
    progress: Progress,
) -> tuple[StageDigests, ...]:
    """Load every slice. Return the digests of each stage's tensors, in order.

    Raises the first error and cancels the other loads.
    """
    stage_digests: dict[int, StageDigests] = {}

    async def load(stage: PlannedStage, control: WorkerClient, order: FetchOrder) -> None:
        stage_digests[stage.spec.index] = await _load(stage, control, order, progress)

    try:
        async with anyio.create_task_group() as tasks:
            for stage, control, order in zip(stages, controls, orders, strict=True):
                tasks.start_soon(load, stage, control, order)
    except* MacpipeError as group:
        raise first_error(group) from None
    return tuple(stage_digests[stage.spec.index] for stage in stages)


async def _load(stage: PlannedStage, control: WorkerClient, order: FetchOrder, progress: Progress) -> StageDigests:
    digests = StageDigests(stage.worker, ())
    async for p in control.load(stage.spec, order):
        if isinstance(p, StageDigests):
            digests = p
            continue
        total = p.total_bytes or stage.weight_bytes
        done = total if p.state in ("hashing", "ready") else p.done_bytes
        progress(replace(p, worker=stage.worker, done_bytes=done, total_bytes=total))
    return digests


async def link_stages(
    plan: Plan, workers: Sequence[WorkerInfo], controls: Sequence[WorkerClient]
) -> tuple[RingStage, ...]:
    """Link each stage to the one before it, all concurrently. If a link fails, the coordinator relays that hop.

    Raises the first other error and cancels the other links.
    """
    inputs: dict[int, tuple[Route, Link | None]] = {}

    async def link(i: int, control: WorkerClient) -> None:
        before = workers[i - 1] if i and plan.route is Route.DIRECT else None
        inputs[i] = await _link(control, plan.epoch, before)

    try:
        async with anyio.create_task_group() as tasks:
            for i, control in enumerate(controls):
                tasks.start_soon(link, i, control)
    except* MacpipeError as group:
        raise first_error(group) from None
    stages: list[RingStage] = []
    for i, worker in enumerate(workers):
        route, measured = inputs[i]
        stages.append(RingStage(worker.name, worker.data_address, route, worker_of(worker.id), measured))
    return tuple(stages)


async def _link(control: WorkerClient, epoch: int, before: WorkerInfo | None) -> tuple[Route, Link | None]:
    """Link a stage. Return the route of its input, and the measured link if it is direct."""
    if before:
        try:
            return Route.DIRECT, await control.link(epoch, before)
        except LinkFailed as e:
            log.warning("link: coordinator relays the hop reason=%s", e.sentence)
    await control.link(epoch, None)
    return Route.RELAY, None
