"""Who is to blame when the ring breaks: a stream that ends tells which neighbour saw it, not which Mac is gone."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from cluster.coordinator.controls import WorkerControl
from cluster.errors import MacpipeError, WorkerLost
from cluster.limits import DESCRIBE_TIMEOUT_S
from cluster.types import PlannedStage


async def diagnose(
    cause: MacpipeError, stages: Sequence[PlannedStage], controls: Sequence[WorkerControl]
) -> MacpipeError:
    """The loss, with the workers named that no longer hold their stage; ``cause`` itself where all of them do."""
    found: dict[str, str] = {}
    async with anyio.create_task_group() as tasks:
        for stage, control in zip(stages, controls, strict=True):
            tasks.start_soon(_examine, stage, control, found)
    guilty = [s.worker for s in stages if s.worker in found]
    if not guilty:
        return cause
    return WorkerLost("; ".join(found[name] for name in guilty), worker=guilty[0])


async def _examine(stage: PlannedStage, control: WorkerControl, found: dict[str, str]) -> None:
    """Note what is wrong with a worker, if anything is."""
    try:
        facts, problem = await control.describe(DESCRIBE_TIMEOUT_S)
    except MacpipeError as e:
        found[stage.worker] = e.sentence
        return
    if problem:
        found[stage.worker] = f"worker {stage.worker}: {problem}"
    elif facts.epoch != stage.spec.epoch:
        found[stage.worker] = f"worker {stage.worker} no longer holds layers {stage.layers}; its engine was restarted"
