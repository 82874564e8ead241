"""Open and release an epoch: a plan, the workers that hold its slices, and the streams between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import anyio

from cluster.coordinator.group_meeting import GroupMeeting, arrange_meetings
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.replan import holds
from cluster.coordinator.ring import Ring, RingStage, StageLost
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.stage_setup import Claim, Progress, claim_worker, link_stages, load_slices
from cluster.coordinator.weight_distribution import WeightDelivery, WeightDistribution
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError
from cluster.core.limits import UNLOAD_TIMEOUT_S
from cluster.core.plan import FetchOrder, LoadedStage, LoadProgress, Plan, PlannedStage
from cluster.core.prefix_keys import edition_key
from cluster.core.text import format_address, parse_address
from cluster.core.worker import WorkerInfo
from cluster.platform.process import first_error
from cluster.transport.streams import Dialer, Received

log = logging.getLogger(__name__)

_NOTHING = FetchOrder((), (), (), "", "")
ControlOf = Callable[[str], WorkerClient]
"""Returns the client of the worker at a control address."""
TakeTerm = Callable[[Sequence[WorkerClient]], Awaitable[None]]
"""Has all these workers granted one term. Raises ``MacpipeError``."""


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
    take_term: TakeTerm
    """Called before slices are loaded, with the clients of all workers of the plan."""
    claim: Claim = claim_worker
    """Called before each load of a slice."""
    rate: float = 0.0
    """Bytes per second of the last load, over all workers; 0 before the first load."""
    insecure_links: tuple[tuple[str, ...], ...] = ()
    """Groups of workers that may exchange activations over insecure links, see ``LoadOrder``."""
    edition: str = ""
    """Name of the model's edition by the digests of all its tensors; empty while they are not all known."""
    _data_ports: dict[str, int] = field(default_factory=dict)
    """Where the data planes of the slices listen that were loaded last, by the workers' names."""

    async def load(self, plan: Plan, workers: Sequence[WorkerInfo], only: Collection[str] | None = None) -> None:
        """Load the slices of all workers, or of those named in ``only``. Raises ``MacpipeError``.

        A worker that already holds its slice reads and verifies nothing. If all workers in ``only`` hold theirs, the
        coordinator's own folder is not read either, so that a recovery does not wait for it.
        """
        began = time.monotonic()
        controls = self._controls(workers)
        await self.take_term(controls)
        selected = [i for i, s in enumerate(plan.stages) if only is None or s.worker in only]
        missing = [i for i in selected if not holds(workers[i], plan.stages[i])]
        stages = [plan.stages[i] for i in selected]
        selected_controls = [controls[i] for i in selected]
        if only is not None and not missing:
            await self._load_slices(stages, selected_controls, [_NOTHING] * len(selected), {})
            await self._load_adapters(plan, workers, selected)
            return
        async with self.weights.delivery(plan, self.model_info, workers) as delivery:
            orders = [delivery.orders[i] if i in missing else _NOTHING for i in selected]
            meetings = arrange_meetings(plan.stages, workers, self.insecure_links)
            loaded = await self._load_slices(stages, selected_controls, orders, meetings)
            new_digests = [d for i, d in zip(selected, loaded, strict=True) if i in missing]
            new_delivery = replace(delivery, orders=tuple(delivery.orders[i] for i in missing))
            await new_delivery.check(new_digests, lambda: self._report_all(plan, "hashing"))
            self.edition = self._edition_of(plan, delivery)
        await self._load_adapters(plan, workers, selected)
        if read_bytes := sum(plan.stages[i].weight_bytes for i in missing):
            self.rate = read_bytes / max(time.monotonic() - began, 1e-3)

    async def _load_slices(
        self,
        stages: Sequence[PlannedStage],
        controls: Sequence[WorkerClient],
        orders: Sequence[FetchOrder],
        meetings: Mapping[int, GroupMeeting],
    ) -> tuple[LoadedStage, ...]:
        loaded = await load_slices(stages, controls, orders, self.progress, self.claim, meetings)
        self._data_ports |= {stage.worker: one.data_port for stage, one in zip(stages, loaded, strict=True)}
        return loaded

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
        located = tuple(self._locate(worker) for worker in workers)
        return Epoch(plan, located, await link_stages(plan, located, controls), controls)

    def _locate(self, worker: WorkerInfo) -> WorkerInfo:
        """Return the worker with the address of the engine that holds its slice."""
        port = self._data_ports.get(worker.name)
        if not port:
            return worker
        host, _ = parse_address(worker.data_address)
        return replace(worker, data_address=format_address(host, port))

    async def connect(self, epoch: Epoch) -> Ring:
        """Open the coordinator's own streams to the stages. Raises ``Unreachable`` or ``StaleEpoch``."""
        ring = await anyio.to_thread.run_sync(
            lambda: Ring(self.dialer, epoch.plan.epoch, epoch.stages, self.received, self.lost)
        )
        self._report_all(epoch.plan, "ready")
        return ring

    def _controls(self, workers: Sequence[WorkerInfo]) -> tuple[WorkerClient, ...]:
        return tuple(self.control(w.control_address) for w in workers)


async def unload_workers(roster: RosterView, epoch: int, addresses: Iterable[str]) -> None:
    """Ask workers to free the holder's slices of this epoch or an older one. Ignore those that do not answer in time.

    ``addresses`` are their control addresses.
    """
    with anyio.move_on_after(UNLOAD_TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            for address in addresses:
                tasks.start_soon(_unload, roster.control(address), epoch, roster.release(address, epoch))


async def _unload(control: WorkerClient, epoch: int, keep: Sequence[int]) -> None:
    try:
        await control.unload(epoch, UNLOAD_TIMEOUT_S, keep)
    except MacpipeError:
        return  # a worker that is gone holds nothing
