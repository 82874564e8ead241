"""Loads a plan: every slice at once, then the links between stages, then the coordinator's own streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio

from cluster.coordinator.controls import WorkerControl
from cluster.coordinator.ring import RingStage
from cluster.errors import LinkFailed, MacpipeError
from cluster.lifetime import first_error
from cluster.types import LoadProgress, Plan, PlannedStage, Route, WorkerFacts

log = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]


async def load_slices(plan: Plan, controls: Sequence[WorkerControl], progress: Progress) -> None:
    """Make every worker hold its slice. Raises the first error; the other loads are cancelled."""
    try:
        async with anyio.create_task_group() as tasks:
            for stage, control in zip(plan.stages, controls, strict=True):
                tasks.start_soon(_load, stage, control, progress)
    except* MacpipeError as group:
        raise first_error(group) from None


async def _load(stage: PlannedStage, control: WorkerControl, progress: Progress) -> None:
    async for p in control.load(stage.spec):
        done = p.total_bytes or stage.weight_bytes if p.state == "ready" else p.done_bytes
        progress(LoadProgress(stage.worker, stage.layers, done, p.total_bytes or stage.weight_bytes, p.state))


async def link_stages(
    plan: Plan, workers: Sequence[WorkerFacts], controls: Sequence[WorkerControl]
) -> tuple[RingStage, ...]:
    """Connect each stage to the one before it, or leave the hop to the coordinator where that cannot be."""
    stages = []
    for i, (worker, control) in enumerate(zip(workers, controls, strict=True)):
        before = workers[i - 1].data_address if i and plan.route is Route.DIRECT else ""
        inlet = await _link(control, plan.epoch, before)
        stages.append(RingStage(worker.name, worker.data_address, inlet if i else Route.RELAY))
    return tuple(stages)


async def _link(control: WorkerControl, epoch: int, before: str) -> Route:
    if before:
        try:
            await control.link(epoch, before)
        except LinkFailed as e:
            log.warning("%s; the coordinator relays this hop", e.sentence)
        else:
            return Route.DIRECT
    await control.link(epoch, "")
    return Route.RELAY
