"""One loaded model from first byte to last token: plan, ring, engine loop, and the way to take it all down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio

from cluster.coordinator.answer import Answer
from cluster.coordinator.checkpoint import Checkpoint
from cluster.coordinator.controls import WorkerControl
from cluster.coordinator.layout import capacity, lay_out
from cluster.coordinator.load import Progress, link_stages, load_slices
from cluster.coordinator.loop import EngineLoop, Totals
from cluster.coordinator.ring import Ring, RingStage
from cluster.coordinator.settings import LoadOrder
from cluster.errors import MacpipeError, NotServing, WorkerLost
from cluster.limits import CANARY_TIMEOUT_S, FAREWELL_S
from cluster.scheduler.scheduler import Scheduler
from cluster.transport.streams import Dialer
from cluster.types import FinishEvent, LoadProgress, Plan, Request, SamplingParams, WorkerFacts

Broken = Callable[[MacpipeError], None]


@dataclass(frozen=True, slots=True)
class Epoch:
    """A model that is loaded and has passed its canary."""

    plan: Plan
    checkpoint: Checkpoint
    ring_stages: tuple[RingStage, ...]
    loop: EngineLoop
    controls: tuple[WorkerControl, ...]

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory, as far as they answer in time."""
        await anyio.to_thread.run_sync(self.loop.stop, error)
        await farewell(self.plan.epoch, self.controls)


async def farewell(epoch: int, controls: Sequence[WorkerControl]) -> None:
    """Ask workers to free an epoch's slices; one that does not answer is left alone."""
    with anyio.move_on_after(FAREWELL_S):
        async with anyio.create_task_group() as tasks:
            for control in controls:
                tasks.start_soon(_unload, control, epoch)


async def _unload(control: WorkerControl, epoch: int) -> None:
    try:
        await control.unload(epoch, FAREWELL_S)
    except MacpipeError:
        return  # a worker that is gone holds nothing


def new_epoch() -> int:
    """A number that grows over restarts of the coordinator: milliseconds of the wall clock."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open an epoch. ``planned`` and ``progress`` are told on the event loop; ``broken`` on another thread."""

    dialer: Dialer
    planned: Callable[[Plan], None]
    progress: Progress
    broken: Broken
    totals: Totals

    async def open(
        self,
        checkpoint: Checkpoint,
        workers: Sequence[WorkerFacts],
        controls: Sequence[WorkerControl],
        order: LoadOrder,
    ) -> Epoch:
        """Plan, load, link, and send one token through every stage. Raises ``MacpipeError``; then nothing is held."""
        plan = lay_out(new_epoch(), checkpoint.shape, workers, order)
        self.planned(plan)
        try:
            await load_slices(plan, controls, self.progress)
            ring_stages = await link_stages(plan, workers, controls)
            loop = await self._start(plan, checkpoint, ring_stages, order.max_step_ms)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await farewell(plan.epoch, controls)
            raise
        for stage in plan.stages:
            self.progress(LoadProgress(stage.worker, stage.layers, stage.weight_bytes, stage.weight_bytes, "ready"))
        return Epoch(plan, checkpoint, ring_stages, loop, tuple(controls))

    async def _start(
        self, plan: Plan, checkpoint: Checkpoint, ring_stages: Sequence[RingStage], max_step_ms: float
    ) -> EngineLoop:
        tokenizer = checkpoint.tokenizer
        scheduler = Scheduler(plan.epoch, capacity(plan, checkpoint.shape, max_step_ms), tokenizer.eos)
        loop = EngineLoop(plan, scheduler, tokenizer.decoder, self.broken)

        def connect() -> Ring:
            return Ring(self.dialer, plan.epoch, ring_stages, loop.received, loop.lost)

        loop.start(await anyio.to_thread.run_sync(connect))
        try:
            await canary(plan, checkpoint, loop)
            loop.count_into(self.totals)
        except BaseException:
            await anyio.to_thread.run_sync(loop.stop, NotServing("the canary token failed"))
            raise
        return loop


async def canary(plan: Plan, checkpoint: Checkpoint, loop: EngineLoop) -> None:
    """Send one token through every stage. Raises ``WorkerLost`` where it does not come back."""
    ids = checkpoint.tokenizer.encode("Hello") or (0,)
    answer = Answer()
    loop.submit(Request(f"canary-{plan.epoch}", ids, SamplingParams(), max_tokens=1), answer)
    try:
        async with asyncio.timeout(CANARY_TIMEOUT_S):
            async for event in answer.events():
                if isinstance(event, FinishEvent):
                    return
    except TimeoutError:
        raise WorkerLost(f"no token came through the stages within {CANARY_TIMEOUT_S:.0f} s") from None
