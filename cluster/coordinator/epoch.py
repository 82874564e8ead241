"""Open and release an epoch: a plan, the workers that hold its slices, and the streams between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import anyio

from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.replan import holds
from cluster.coordinator.ring import Ring, RingStage, StageLost
from cluster.coordinator.stage_setup import Progress, link_stages, load_slices
from cluster.coordinator.weight_distribution import WeightDelivery, WeightDistribution
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError
from cluster.core.limits import UNLOAD_TIMEOUT_S
from cluster.core.plan import FetchOrder, LoadProgress, Plan
from cluster.core.prefix_keys import edition_key
from cluster.core.worker import WorkerInfo
from cluster.platform.process import first_error
from cluster.transport.streams import Dialer, Received

log = logging.getLogger(__name__)

_NOTHING = FetchOrder((), (), (), "", "")
ControlOf = Callable[[str], WorkerClient]
"""Returns the client of the worker at a control address."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Loaded and linked slices. ``workers`` and their clients ``controls`` are in the order of the plan's stages."""

    plan: Plan
    workers: tuple[WorkerInfo, ...]
    stages: tuple[RingStage, ...]
    controls: tuple[WorkerClient, ...]


@dataclass(slots=True)
class EpochBuilder:
    """Loads, links and connects epochs.

    ``progress`` is called on the event loop, ``received`` and ``lost`` on the streams' threads.
    """

    dialer: Dialer
    weights: WeightDistribution
    model_info: ModelInfo
    control: ControlOf
    progress: Progress
    received: Received
    lost: StageLost
    rate: float = 0.0
    """Bytes per second of the last load, over all workers; 0 before the first load."""
    edition: str = ""
    """Name of the model's edition by the digests of all its tensors; empty while they are not all known."""

    async def load(self, plan: Plan, workers: Sequence[WorkerInfo], only: Collection[str] | None = None) -> None:
        """Load the slices of all workers, or of those named in ``only``. Raises ``MacpipeError``.

        A worker that already holds its slice reads and verifies nothing. If all workers in ``only`` hold theirs, the
        coordinator's own folder is not read either, so that a recovery does not wait for it.
        """
        began = time.monotonic()
        controls = self._controls(workers)
        selected = [i for i, s in enumerate(plan.stages) if only is None or s.worker in only]
        missing = [i for i in selected if not holds(workers[i], plan.stages[i])]
        stages = [plan.stages[i] for i in selected]
        selected_controls = [controls[i] for i in selected]
        if only is not None and not missing:
            await load_slices(stages, selected_controls, [_NOTHING] * len(selected), self.progress)
            await self._load_adapters(plan, workers, selected)
            return
        async with self.weights.delivery(plan, self.model_info, workers) as delivery:
            orders = [delivery.orders[i] if i in missing else _NOTHING for i in selected]
            stage_digests = await load_slices(stages, selected_controls, orders, self.progress)
            new_digests = [d for i, d in zip(selected, stage_digests, strict=True) if i in missing]
            new_delivery = replace(delivery, orders=tuple(delivery.orders[i] for i in missing))
            await new_delivery.check(new_digests, lambda: self._report_all(plan, "hashing"))
            self.edition = self._edition_of(plan, delivery)
        await self._load_adapters(plan, workers, selected)
        if read_bytes := sum(plan.stages[i].weight_bytes for i in missing):
            self.rate = read_bytes / max(time.monotonic() - began, 1e-3)

    async def _load_adapters(self, plan: Plan, workers: Sequence[WorkerInfo], selected: Sequence[int]) -> None:
        """Let the selected stages hold the model's adapters, if there are any or a worker holds some."""
        if self.model_info.adapters.loaded or any(workers[i].adapters for i in selected):
            chosen = replace(plan, stages=tuple(plan.stages[i] for i in selected))
            await self.set_adapters(chosen, [workers[i] for i in selected])

    async def set_adapters(self, plan: Plan, workers: Sequence[WorkerInfo]) -> None:
        """Let the loaded stages of a plan hold just the model's adapters. Raises ``MacpipeError``."""
        adapters = self.model_info.adapters.loaded
        try:
            async with self.weights.adapter_delivery(adapters, workers) as peers, anyio.create_task_group() as tasks:
                for stage, control, own_peers in zip(plan.stages, self._controls(workers), peers, strict=True):
                    tasks.start_soon(control.set_adapters, plan.epoch, stage.layers, adapters, own_peers)
        except* MacpipeError as group:
            raise first_error(group) from None

    def _edition_of(self, plan: Plan, delivery: WeightDelivery) -> str:
        known = delivery.manifest.known
        names = {name for order in delivery.orders for name in order.tensors}
        digests = {name: known[name] for name in names if name in known}
        complete = len(digests) == len(names)
        spec = plan.stages[0].spec
        return edition_key(plan.model.fingerprint, digests, spec.kv_bits, spec.weight_bits) if complete else ""

    def _report_all(self, plan: Plan, state: str) -> None:
        for stage in plan.stages:
            self.progress(LoadProgress(stage.worker, stage.layers, stage.weight_bytes, stage.weight_bytes, state))

    async def link(self, plan: Plan, workers: Sequence[WorkerInfo]) -> Epoch:
        """Link the loaded stages with each other. Raises ``MacpipeError``."""
        controls = self._controls(workers)
        return Epoch(plan, tuple(workers), await link_stages(plan, workers, controls), controls)

    async def connect(self, epoch: Epoch) -> Ring:
        """Open the coordinator's own streams to the stages. Raises ``Unreachable`` or ``StaleEpoch``."""
        ring = await anyio.to_thread.run_sync(
            lambda: Ring(self.dialer, epoch.plan.epoch, epoch.stages, self.received, self.lost)
        )
        self._report_all(epoch.plan, "ready")
        return ring

    def _controls(self, workers: Sequence[WorkerInfo]) -> tuple[WorkerClient, ...]:
        return tuple(self.control(w.control_address) for w in workers)


async def unload_workers(epoch: int, controls: Sequence[WorkerClient]) -> None:
    """Ask workers to free their slices of this epoch or an older one. Ignore workers that do not answer in time."""
    with anyio.move_on_after(UNLOAD_TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            for control in controls:
                tasks.start_soon(_unload, control, epoch)


async def _unload(control: WorkerClient, epoch: int) -> None:
    try:
        await control.unload(epoch, UNLOAD_TIMEOUT_S)
    except MacpipeError:
        return  # a worker that is gone holds nothing
