"""Begin a training run: check model and data, choose the workers, and train on them in place of serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from cluster.coordinator.epoch import unload_workers
from cluster.coordinator.model_reader import ModelInfo, ModelReader
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.replan import Assignment
from cluster.coordinator.reporter import BothReporters, LoadReporter
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.training_job import LOSSES, TrainingJob
from cluster.coordinator.worker_gathering import gather_workers, require_cuts
from cluster.core.errors import DoesNotFit, MacpipeError, NotServing
from cluster.core.frames import Tensor
from cluster.core.limits import UNLOAD_TIMEOUT_S
from cluster.core.plan import ModelShape, Objective, Plan
from cluster.core.text import names_in_words
from cluster.core.training import TrainingOptions
from cluster.core.training_events import TrainingEvent, TrainingNotice
from cluster.core.training_limits import MAX_ENGINE_LOSSES
from cluster.core.worker import WorkerInfo
from cluster.placement.training_cut import cut_for_training, head_cost
from cluster.placement.training_memory import require_room
from cluster.sandbox.training_data import TrainingData

__all__ = ["Restored", "ServedModel", "TrainingHost", "TrainingMode", "TrainingRequest"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """What to train. ``folder`` has the data sets; ``adapters`` are those to begin with, by name; none: new ones."""

    order: LoadOrder
    options: TrainingOptions
    folder: Path
    adapters: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingHost:
    """What a run needs of its coordinator.

    ``make_plan`` plans over workers; ``stop_serving`` ends what is served; ``report`` hears of loads beside the client;
    ``changed`` is set when the coordinator's state changes.
    """

    reader: ModelReader
    deps: ServiceDeps
    make_plan: Callable[[int, ModelShape, Sequence[WorkerInfo], LoadOrder], Awaitable[Plan]]
    stop_serving: Callable[[MacpipeError], Awaitable[None]]
    report: LoadReporter
    changed: asyncio.Event


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that was served before a training: its name, and the order that loads it again."""

    name: str
    order: LoadOrder


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of the models that were served before a training. ``sentence`` says it to people.

    ``served`` is whether all of them are served again.
    """

    served: bool
    sentence: str


class TrainingMode:
    """At most one training at a time, in place of serving. ``job`` is the run that takes place; None if none does.

    ``load`` loads a model that was served before. If that fails, ``problem`` says why until the next load or training,
    and ``notify`` is called with it.
    """

    def __init__(
        self, load: Callable[[ServedModel, LoadReporter], Awaitable[None]], notify: Callable[[str], None]
    ) -> None:
        self._load, self._notify = load, notify
        self.problem = ""
        self._running: asyncio.Task[object] | None = None
        self._restoring: asyncio.Task[Restored] | None = None
        self._closed = False
        self.job: TrainingJob | None = None

    async def run(
        self,
        host: TrainingHost,
        request: TrainingRequest,
        tell: Callable[[TrainingEvent], None],
        follower: LoadReporter,
        served: Sequence[ServedModel],
    ) -> None:
        """Train to the end. What is ``served`` goes on until model, data and workers are found.

        If the same model is among it with quantized weights, those are what is trained.

        Raises the errors of ``ModelReader.read``, of the data (``TrainingData.open``), of planning, and of the job.
        """
        if bits := await _served_bits(host.reader, request.order, served):
            request = replace(request, order=replace(request.order, quantize=bits))
            tell(TrainingNotice(f"the weights are those that are served, quantized to {bits} bits"))
        model_info = await host.reader.read(request.order)
        self._running = asyncio.current_task()
        data: TrainingData | None = None
        try:
            require_cuts(model_info.shape, request.order)  # first what takes no time: tokenizing may take long
            request.options.require_layers(model_info.shape.layers)
            data = await TrainingData.open(request.folder, model_info.found.folder, request.options)
            await self._train(host, request, model_info, data, tell, BothReporters(host.report, follower))
        finally:
            with anyio.CancelScope(shield=True):
                await model_info.close()
                if data:
                    await data.close()
            if self.job and served and not self._closed:
                self._restoring = asyncio.create_task(self._serve_again(served, follower))
            self.job = self._running = None
            host.changed.set()

    async def wait_restored(self) -> Restored | None:
        """Wait until what was served before the last training is loaded again, or that has failed.

        Return None if nothing was served, or if the coordinator stops.
        """
        if self._restoring is None:
            return None
        await asyncio.wait((self._restoring,))
        return None if self._restoring.cancelled() else self._restoring.result()

    @asynccontextmanager
    async def report_restored(self, tell: Callable[[TrainingEvent], None]) -> AsyncIterator[None]:
        """Tell after a training what became of the models that were served.

        Raises ``NotServing`` if one of them is not served again.
        """
        self._restoring, self.problem = None, ""
        try:
            yield
        except MacpipeError:
            if outcome := await self.wait_restored():
                tell(TrainingNotice(outcome.sentence))
            raise
        if outcome := await self.wait_restored():
            if not outcome.served:
                raise NotServing(outcome.sentence)
            tell(TrainingNotice(outcome.sentence))

    async def close(self) -> None:
        """End the training, or the load of what was served before it."""
        self._closed = True
        for task in filter(None, (self._running, self._restoring)):
            task.cancel()
            await asyncio.wait((task,), timeout=2 * UNLOAD_TIMEOUT_S)

    async def _serve_again(self, served: Sequence[ServedModel], follower: LoadReporter) -> Restored:
        """Load one model after the other, those after one that fails too."""
        again, problems = list[str](), list[str]()
        for model in served:
            if problem := await self._load_again(model, follower):
                problems.append(problem)
            else:
                again.append(model.order.model)
        self.problem = "; ".join(problems)
        if problems:
            self._notify(self.problem)
        restored = [f"{names_in_words(again)} {'is' if len(again) == 1 else 'are'} served again"] if again else []
        return Restored(served=not problems, sentence="; ".join((*restored, *problems)))

    async def _load_again(self, model: ServedModel, follower: LoadReporter) -> str:
        """Return why a model is not served again; "" if it is."""
        name = model.order.model
        log.info("training: ended, loading what was served before model=%s", name)
        for attempt in range(1, MAX_ENGINE_LOSSES + 1):
            try:
                await self._load(model, follower)
            except LOSSES as e:
                log.warning("training: load of the served model failed reason=%s attempt=%d", e.sentence, attempt)
                why = e.sentence
            except MacpipeError as e:
                why = e.sentence
                break
            else:
                return ""
        return f"{name} is not served again after the training: {why}"

    async def _train(
        self,
        host: TrainingHost,
        request: TrainingRequest,
        model_info: ModelInfo,
        data: TrainingData,
        tell: Callable[[TrainingEvent], None],
        report: LoadReporter,
    ) -> None:
        deps, order = host.deps, replace(request.order, objective=Objective.THROUGHPUT)
        found = await gather_workers(deps.roster, order, model_info.shape, report)
        number = deps.epochs.next(m.info.epoch for m in deps.roster.members)
        plan = await _plan(host, number, model_info.shape, found, order, request.options)
        require_room(plan, model_info.shape, request.options, min(data.longest, request.options.max_seq_length))
        report.planned(plan)
        by_name = {w.name: w for w in found}
        job = TrainingJob(deps, model_info, order, request.options, data, tell, report.progress, request.adapters)
        self.job = job  # from here on, what was served is loaded again afterwards
        host.changed.set()
        await host.stop_serving(job.refusal())
        deps.heartbeat.start()
        try:
            await job.run(Assignment(plan, tuple(by_name[stage.worker] for stage in plan.stages)))
        finally:
            with anyio.CancelScope(shield=True):
                await unload_workers(deps.roster, deps.epochs.last, job.contacted)
                deps.roster.pin(())


async def _served_bits(reader: ModelReader, order: LoadOrder, served: Sequence[ServedModel]) -> int:
    """Return the bits to which the weights of this model are quantized while it is served; 0 if they are not."""
    quantized = [model.order for model in served if model.order.quantize]
    if not quantized:
        return 0
    own = await reader.read_shape(order)
    for other in quantized:
        shape = await reader.read_shape(LoadOrder(other.model))
        if own.model.fingerprint == shape.model.fingerprint:
            return other.quantize
    return 0


async def _plan(
    host: TrainingHost,
    number: int,
    shape: ModelShape,
    found: Sequence[WorkerInfo],
    order: LoadOrder,
    options: TrainingOptions,
) -> Plan:
    """Return the plan of the order, with the cuts moved to where the stages take equally long, if that fits."""
    plan = await host.make_plan(number, shape, found, order)
    if order.layers or len(plan.stages) == 1:
        return plan
    by_name = {w.name: w for w in found}
    workers = [by_name[stage.worker] for stage in plan.stages]
    known = all(w.profile.known for w in workers)
    speeds = [w.profile.flops if known else 1.0 for w in workers]
    layers = plan.stages[-1].layers.end
    trained = layers if options.num_layers < 1 else options.num_layers
    cut = cut_for_training(
        layers, shape.clean_cuts, speeds, trained, recompute=options.grad_checkpoint, head=head_cost(shape)
    )
    try:
        return await host.make_plan(number, shape, workers, replace(order, layers=cut, worker_count=None))
    except DoesNotFit:
        return plan
