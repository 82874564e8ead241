"""One loaded model from first byte to last token: plan, ring, engine loop, and the way to take it all down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from cluster.coordinator.answer import Answer
from cluster.coordinator.checkpoint import Checkpoint
from cluster.coordinator.controls import WorkerControl
from cluster.coordinator.diagnosis import Inquest, diagnose
from cluster.coordinator.layout import capacity
from cluster.coordinator.load import Progress, link_stages, load_slices
from cluster.coordinator.loop import EngineLoop
from cluster.coordinator.pace import Pace
from cluster.coordinator.ring import Ring, RingStage
from cluster.coordinator.supply import Supply
from cluster.errors import MacpipeError, NotServing, WorkerLost
from cluster.limits import (
    CANARY_TIMEOUT_S,
    CONTROL_TIMEOUT_S,
    DESCRIBE_TIMEOUT_S,
    FAREWELL_S,
    HEARTBEAT_S,
    LEARN_S,
)
from cluster.loads import LoadProgress
from cluster.scheduler.scheduler import Scheduler
from cluster.transport.streams import Dialer
from cluster.types import FinishEvent, Plan, Request, SamplingParams, WorkerFacts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Epoch:
    """A model that is loaded and has passed its canary. ``inquest`` knows whether its ring has broken since."""

    plan: Plan
    checkpoint: Checkpoint
    ring_stages: tuple[RingStage, ...]
    loop: EngineLoop
    controls: tuple[WorkerControl, ...]
    inquest: Inquest

    async def keep(self) -> None:
        """Let the workers hear that this coordinator is there, until cancelled; and what their frames took."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._teach_now_and_then)
            while True:
                await self._beat_all()

    async def _beat_all(self) -> None:
        async with anyio.create_task_group() as tasks:
            for control in self.controls:
                tasks.start_soon(_beat, control)
            tasks.start_soon(anyio.sleep, HEARTBEAT_S)

    async def _teach_now_and_then(self) -> None:
        while True:
            await anyio.sleep(LEARN_S)
            await self.teach()

    async def teach(self) -> None:
        """Tell every worker what its frames took over what its profile predicts, where enough have been seen."""
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            view = await asyncio.wrap_future(self.loop.view())
            async with anyio.create_task_group() as tasks:
                for pace, control in zip(view.pace, self.controls, strict=True):
                    if pace.ratio:
                        tasks.start_soon(_learn, control, self.plan.model.fingerprint, pace.ratio)

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory, as far as they answer in time."""
        await anyio.to_thread.run_sync(self.loop.stop, error)
        await farewell(self.plan.epoch, self.controls)


async def _beat(control: WorkerControl) -> None:
    try:
        await control.describe(DESCRIBE_TIMEOUT_S)
    except MacpipeError as e:
        log.info("no heartbeat: %s", e.sentence)


async def _learn(control: WorkerControl, fingerprint: str, ratio: float) -> None:
    try:
        await control.learn(fingerprint, ratio)
    except MacpipeError as e:
        log.info("a ratio was not learned: %s", e.sentence)


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
    """How to open an epoch; ``progress`` is told on the event loop."""

    dialer: Dialer
    progress: Progress
    max_step_ms: float
    supply: Supply

    async def open(
        self, plan: Plan, checkpoint: Checkpoint, workers: Sequence[WorkerFacts], controls: Sequence[WorkerControl]
    ) -> Epoch:
        """Load, link, and send one token through every stage. Raises ``MacpipeError``; then nothing is held."""
        try:
            async with self.supply.delivery(plan, checkpoint, workers) as delivery:
                proofs = await load_slices(plan, controls, delivery.orders, self.progress)
                await delivery.check(proofs, lambda: self._tell(plan, "hashing"))
            ring_stages = await link_stages(plan, workers, controls)
            epoch = await self._start(plan, checkpoint, ring_stages, workers, controls)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await farewell(plan.epoch, controls)
            raise
        self._tell(plan, "ready")
        return epoch

    def _tell(self, plan: Plan, state: str) -> None:
        for stage in plan.stages:
            self.progress(LoadProgress(stage.worker, stage.layers, stage.weight_bytes, stage.weight_bytes, state))

    async def _start(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        ring_stages: tuple[RingStage, ...],
        workers: Sequence[WorkerFacts],
        controls: Sequence[WorkerControl],
    ) -> Epoch:
        tokenizer, inquest = checkpoint.tokenizer, Inquest(plan.stages, controls)
        scheduler = Scheduler(plan.epoch, capacity(plan, checkpoint.shape, self.max_step_ms), tokenizer.eos)
        pace = Pace(checkpoint.shape, plan.stages, [w.profile for w in workers])
        loop = EngineLoop(plan, scheduler, tokenizer.decoder, inquest.begin, pace=pace, parser=tokenizer.parser)
        inquest.tell(loop.fail)

        def connect() -> Ring:
            return Ring(self.dialer, plan.epoch, ring_stages, loop.received, loop.lost)

        loop.start(await anyio.to_thread.run_sync(connect))
        epoch = Epoch(plan, checkpoint, ring_stages, loop, tuple(controls), inquest)
        try:
            await canary(epoch)
        except BaseException:
            await anyio.to_thread.run_sync(loop.stop, NotServing("the canary token failed"))
            raise
        return epoch


async def canary(epoch: Epoch) -> None:
    """Send one token through every stage. Raises ``WorkerLost``, naming who is gone, where it does not come back."""
    ids = (epoch.checkpoint.tokenizer.encode("Hello") or (0,))[:2]
    answer = Answer()
    epoch.loop.submit(Request(f"canary-{epoch.plan.epoch}", ids, SamplingParams(), max_tokens=1), answer)
    try:
        async with asyncio.timeout(CANARY_TIMEOUT_S):
            async for event in answer.events():
                if isinstance(event, FinishEvent):
                    return
    except TimeoutError:
        cause = WorkerLost(f"no token came through the stages within {CANARY_TIMEOUT_S:.0f} s")
        raise await diagnose(cause, epoch.plan.stages, epoch.controls) from None
