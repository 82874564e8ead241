"""One epoch: a plan, the workers that hold its slices, and the streams between them. How it is opened and let go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import anyio

from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.replan import holds
from cluster.coordinator.ring import Ring, RingStage, StageLost
from cluster.coordinator.slice_loading import Progress, link_stages, load_slices
from cluster.coordinator.weight_distribution import WeightDistribution
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError
from cluster.core.limits import FAREWELL_S
from cluster.core.plan import FetchOrder, LoadProgress, Plan
from cluster.core.worker import WorkerInfo
from cluster.transport.streams import Dialer, Received

log = logging.getLogger(__name__)

_NOTHING = FetchOrder((), (), (), "", "")
ControlOf = Callable[[str], WorkerClient]
"""The control plane of the worker at an address."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Slices that are loaded and linked. ``controls`` are those of ``workers``, in the plan's order."""

    plan: Plan
    workers: tuple[WorkerInfo, ...]
    stages: tuple[RingStage, ...]
    controls: tuple[WorkerClient, ...]


@dataclass(slots=True)
class EpochBuilder:
    """How epochs are opened; ``progress`` is told on the event loop, ``received`` and ``lost`` on streams' threads."""

    dialer: Dialer
    supply: WeightDistribution
    checkpoint: ModelInfo
    control: ControlOf
    progress: Progress
    received: Received
    lost: StageLost
    rate: float = 0.0
    """Bytes a second that the last load of weights read, over all workers; 0 before any."""

    async def load(self, plan: Plan, workers: Sequence[WorkerInfo], only: Collection[str] | None = None) -> None:
        """Make every worker, or ``only`` some, hold its slice; one that holds it already reads and proves nothing.

        Where ``only`` some are asked and none of them lacks anything, the coordinator's folder is not looked at either:
        a recovery waits for nothing. Raises ``MacpipeError``.
        """
        began, controls = time.monotonic(), self._controls(workers)
        asked = [i for i, s in enumerate(plan.stages) if only is None or s.worker in only]
        missing = [i for i in asked if not holds(workers[i], plan.stages[i])]
        stages, called = [plan.stages[i] for i in asked], [controls[i] for i in asked]
        if only is not None and not missing:
            await load_slices(stages, called, [_NOTHING] * len(asked), self.progress)
            return
        async with self.supply.delivery(plan, self.checkpoint, workers) as delivery:
            orders = [delivery.orders[i] if i in missing else _NOTHING for i in asked]
            proofs = await load_slices(stages, called, orders, self.progress)
            due = [p for i, p in zip(asked, proofs, strict=True) if i in missing]
            news = replace(delivery, orders=tuple(delivery.orders[i] for i in missing))
            await news.check(due, lambda: self._tell(plan, "hashing"))
        if read := sum(plan.stages[i].weight_bytes for i in missing):
            self.rate = read / max(time.monotonic() - began, 1e-3)

    def _tell(self, plan: Plan, state: str) -> None:
        for stage in plan.stages:
            self.progress(LoadProgress(stage.worker, stage.layers, stage.weight_bytes, stage.weight_bytes, state))

    async def link(self, plan: Plan, workers: Sequence[WorkerInfo]) -> Epoch:
        """Connect stages that are loaded with each other. Raises ``MacpipeError``."""
        controls = self._controls(workers)
        return Epoch(plan, tuple(workers), await link_stages(plan, workers, controls), controls)

    async def connect(self, epoch: Epoch) -> Ring:
        """Open the coordinator's own streams. Raises ``Unreachable`` or ``StaleEpoch``."""
        ring = await anyio.to_thread.run_sync(
            lambda: Ring(self.dialer, epoch.plan.epoch, epoch.stages, self.received, self.lost)
        )
        self._tell(epoch.plan, "ready")
        return ring

    def _controls(self, workers: Sequence[WorkerInfo]) -> tuple[WorkerClient, ...]:
        return tuple(self.control(w.control_address) for w in workers)


async def farewell(epoch: int, controls: Sequence[WorkerClient]) -> None:
    """Ask workers to free the slices of an epoch or an older one; one that does not answer is left alone."""
    with anyio.move_on_after(FAREWELL_S):
        async with anyio.create_task_group() as tasks:
            for control in controls:
                tasks.start_soon(_unload, control, epoch)


async def _unload(control: WorkerClient, epoch: int) -> None:
    try:
        await control.unload(epoch, FAREWELL_S)
    except MacpipeError:
        return  # a worker that is gone holds nothing
