"""Train a model's adapters over several workers, from the first batch to the last, through any number of epochs.

It keeps the training state now and then, and the batches since. If a worker is lost, the next epoch starts from there
and runs those batches again; their results are counted once, so the curve of losses is that of an undisturbed run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Final

from cluster.codec.adapter_file import write_adapters
from cluster.coordinator.epoch import EpochBuilder
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.replan import Assignment, reassign_layers
from cluster.coordinator.ring import RingStage
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.stage_setup import Progress
from cluster.coordinator.training_reports import TrainingReports
from cluster.coordinator.training_stages import TrainingStages
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.cluster_state import TrainingProgress
from cluster.core.errors import (
    InvalidOption,
    LinkFailed,
    MacpipeError,
    NotServing,
    StaleEpoch,
    Unreachable,
    WorkerLost,
)
from cluster.core.frames import Tensor
from cluster.core.futures import ignore_error
from cluster.core.limits import RECOVERY_PAUSE_S, RETURN_S
from cluster.core.plan import Plan, Route
from cluster.core.text import count_in_words, duration_in_words
from cluster.core.training import TrainingOptions
from cluster.core.training_events import AdapterFile, TrainingEvent, TrainingNotice
from cluster.core.training_frames import ADAPTER, DataBatch, Purpose, Task, TrainingCommand
from cluster.core.training_limits import KEEP_INTERVAL_S, MAX_ENGINE_LOSSES, TRAINING_WAIT_S
from cluster.membership.suspicion import Belief, Standing
from cluster.sandbox.training_data import TrainingData
from cluster.scheduler.training_schedule import TrainingOrder, TrainingSchedule
from cluster.security.trust import worker_of

__all__ = ["LOSSES", "TrainingJob"]

log = logging.getLogger(__name__)
_EVALUATIONS: Final = {Purpose.VALIDATE: "computing the validation loss", Purpose.TEST: "computing the test loss"}
MIN_RETRY_S, MAX_RETRY_S = 10.0, 3600.0
LOSSES = (WorkerLost, Unreachable, LinkFailed, StaleEpoch)
"""Errors of a Mac that went, or is not ready yet: another try may succeed."""


class TrainingJob:
    """One run. ``tell`` is called with each event, on the event loop. ``adapters`` are those to begin with, by name."""

    def __init__(
        self,
        deps: ServiceDeps,
        model_info: ModelInfo,
        order: LoadOrder,
        options: TrainingOptions,
        data: TrainingData,
        tell: Callable[[TrainingEvent], None],
        progress: Progress,
        adapters: Mapping[str, Tensor],
    ) -> None:
        self._deps, self._model_info, self._order, self._options = deps, model_info, order, options
        self._data, self._tell = data, tell
        self._builder = EpochBuilder(
            deps.dialer,
            deps.weights,
            model_info,
            self._control,
            progress,
            lambda message: None,
            lambda *loss: None,
            deps.roster.take_term,
        )
        self.reports = TrainingReports(options)
        self.contacted: set[str] = set()
        """Control addresses of all workers that were asked to load."""
        self._state: dict[str, Tensor] = {ADAPTER + name: tensor for name, tensor in adapters.items()}
        self._given = frozenset(self._state)
        self._kept_at = time.monotonic()
        self._since: deque[DataBatch] = deque()
        """Batches that were started since the state was kept."""
        self._saved = 0
        self._stages: TrainingStages | None = None
        self.plan: Plan | None = None
        """The present plan; None before the first epoch."""
        self._doing = ""
        """What it does or waits for instead of training."""
        self._workers: frozenset[str] = frozenset()
        self._progress_mark = -1

    async def run(self, first: Assignment) -> None:
        """Train to the end. Raises the error of the data, of a stage, or of a loss that nothing can replace."""
        if self._data.cut:
            cut, limit = count_in_words(self._data.cut, "sequence"), self._options.max_seq_length
            self._tell(
                TrainingNotice(
                    f"{cut} will be cut to {limit} tokens; the longest has {self._data.longest}; split them, or raise "
                    "--max-seq-length"
                )
            )
        self.plan, assignment = first.plan, first
        losses = 0
        while True:
            try:
                await self._run_epoch(assignment)
                return
            except LOSSES as loss:
                log.warning("training: epoch lost reason=%s epoch=%d", loss.sentence, assignment.plan.epoch)
                losses = losses + 1 if self.reports.iteration == self._progress_mark else 1
                self._progress_mark = self.reports.iteration
                if isinstance(loss, StaleEpoch):
                    self._deps.epochs.learn_refusal(loss)
                if losses > MAX_ENGINE_LOSSES:
                    raise
                self._tell(TrainingNotice(f"{loss.sentence}; training continues from the last kept state"))
                assignment = await self._replace(assignment, loss)

    def on_belief(self, belief: Belief) -> None:
        """Handle a changed belief: if a worker that trains is gone, its epoch is lost."""
        if self._stages and belief.worker in self._workers and belief.standing is Standing.GONE:
            self._stages.fail(WorkerLost(f"worker {belief.worker}: {belief.why}", worker=belief.worker))

    def refusal(self) -> NotServing:
        """Return the error of a request that comes meanwhile, with the time until the end of the training."""
        return NotServing(
            f"the cluster is {self.describe()}; it serves again afterwards",
            retry_after_s=min(max(self.reports.seconds_left, MIN_RETRY_S), MAX_RETRY_S),
        )

    @property
    def model_name(self) -> str:
        """The name of the model whose adapters are trained."""
        return self._model_info.shape.model.name

    def describe(self) -> str:
        """Say how far it is, and what it does or waits for."""
        name, progress = PurePath(self.model_name).name, self.progress
        left = f", {duration_in_words(progress.seconds_left)} left" if progress.seconds_left else ""
        doing = f": {self._doing}" if self._doing else ""
        return f"training adapters of {name}, step {progress.iteration} of {progress.iterations}{left}{doing}"

    @property
    def progress(self) -> TrainingProgress:
        """How many steps are done, and the time that is left."""
        return TrainingProgress(self.reports.iteration, self._options.iters, self.reports.seconds_left)

    def _control(self, address: str) -> WorkerClient:
        self.contacted.add(address)
        return self._deps.roster.control(address)

    async def _replace(self, before: Assignment, loss: MacpipeError) -> Assignment:
        """Return the next assignment, once there are workers for one. Raises ``loss`` after ``TRAINING_WAIT_S``."""
        began = time.monotonic()
        names = [stage.worker for stage in before.plan.stages]
        while True:
            members = await self._deps.heartbeat.ask(names, time.monotonic())
            restarting = [m for m in members if m.info.name in names and m.problem and m.reachable]
            waited_s = time.monotonic() - began
            try:
                if not restarting or waited_s > RETURN_S:
                    self._wait_for("")
                    number = self._deps.epochs.next(m.info.epoch for m in members)
                    return reassign_layers(number, before.plan, self._model_info.shape, self._order, members)
                self._wait_for(f"the engine of {restarting[0].info.name}: {restarting[0].problem}")
            except MacpipeError as error:
                if waited_s > TRAINING_WAIT_S:
                    raise loss from error
                self._wait_for(f"a Mac: {error.sentence}")
            await asyncio.sleep(RECOVERY_PAUSE_S)

    def _wait_for(self, what: str) -> None:
        """Note what is waited for, and log it if that is new."""
        doing = f"waiting for {what}" if what else ""
        if doing and doing != self._doing:
            log.warning("training: waiting reason=%s", what)
        self._doing = doing

    async def _run_epoch(self, assignment: Assignment) -> None:
        plan, workers = assignment.plan, assignment.workers
        self.plan, self._workers = plan, frozenset(w.name for w in workers)
        self._doing = "loading the layers"
        self._deps.roster.pin(workers)
        await self._load(assignment)
        ring = [RingStage(w.name, w.data_address, Route.RELAY, worker_of(w.id)) for w in workers]
        stages = self._stages = TrainingStages(plan.epoch, ring)
        try:
            await stages.open(self._deps.dialer)
            self._doing = "preparing the adapters"
            names = await stages.prepare(self._options.to_json())
            await self._write_state(stages, names)
            lowest = next(i for i, own in enumerate(names) if own)
            self.reports.restart()
            self._doing = ""
            await self._train(stages, TrainingSchedule(len(names), lowest), range(lowest, len(names)))
        finally:
            self._stages = None
            stages.close()

    async def _load(self, assignment: Assignment) -> None:
        """Load the slices. Raises ``WorkerLost`` if a worker is gone, since a stopped Mac never reports an error."""
        task = asyncio.create_task(self._builder.load(assignment.plan, assignment.workers))
        task.add_done_callback(ignore_error)  # nobody awaits the load if a loss is raised first
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=RECOVERY_PAUSE_S)
                self._deps.heartbeat.require(self._workers, "while it was loading")
            await task
        finally:
            task.cancel()

    async def _write_state(self, stages: TrainingStages, names: list[tuple[str, ...]]) -> None:
        """Give each stage its part of the kept state. Raises ``InvalidOption`` if given adapters fit no stage."""
        known = {ADAPTER + name for own in names for name in own}
        if self._given and (unknown := sorted(name for name in self._given if name not in known)):
            raise InvalidOption(
                f"the adapter has {unknown[0].removeprefix(ADAPTER)}, which these options do not train: it belongs to "
                "another base, or to other layers or parameters",
                field="resume_adapter_file",
            )
        for stage, own in enumerate(names):
            if own and (part := {name: tensor for name, tensor in self._state.items() if _belongs(name, own)}):
                await stages.write_state(stage, part)

    async def _train(self, stages: TrainingStages, schedule: TrainingSchedule, training: range) -> None:
        replay = deque(self._since)
        keep: DataBatch | None = None
        ended = False
        while True:
            while schedule.wants and not ended and keep is None:
                batch = replay.popleft() if replay else await self._next_batch()
                if batch is None:
                    ended = True
                else:
                    self._doing = _EVALUATIONS.get(batch.purpose, "")
                    schedule.add(batch, update=self._is_update(batch))
                    keep = batch if self._is_due(batch) else None
            for order in schedule.next_orders():
                stages.send(order.stage, _command(order))
            if not schedule.idle:
                stage, reply = await stages.read()
                for result in schedule.on_reply(stage, reply):
                    if report := self.reports.add(result, stages.peaks):
                        self._tell(report)
            elif keep:
                await self._keep(await stages.read_state(training), keep)
                keep = None
            else:
                return

    async def _next_batch(self) -> DataBatch | None:
        batch = await self._data.next()
        if batch:
            self._since.append(batch)
        return batch

    def _is_update(self, batch: DataBatch) -> bool:
        last = batch.purpose is Purpose.TRAIN and batch.ends_batch
        return last and batch.iteration % self._options.grad_accumulation_steps == 0

    def _is_due(self, batch: DataBatch) -> bool:
        """Return whether the state is to be kept after a batch."""
        if batch.purpose is not Purpose.TRAIN or not batch.ends_batch:
            return False
        asked = batch.iteration % self._options.save_every == 0 or batch.iteration == self._options.iters
        return asked or time.monotonic() - self._kept_at > KEEP_INTERVAL_S

    async def _keep(self, state: dict[str, Tensor], batch: DataBatch) -> None:
        """Keep a state, and send the adapters to the client if they are due."""
        self._state, self._given = state, frozenset()
        self._kept_at = time.monotonic()
        while self._since and self._since[0].number <= batch.number:
            self._since.popleft()
        final = batch.iteration == self._options.iters
        if batch.iteration > self._saved and (final or batch.iteration % self._options.save_every == 0):
            self._saved = batch.iteration
            adapters = {n.removeprefix(ADAPTER): t for n, t in state.items() if n.startswith(ADAPTER)}
            self._tell(AdapterFile(batch.iteration, await asyncio.to_thread(write_adapters, adapters), final))
        self.reports.pause()


def _belongs(name: str, own: tuple[str, ...]) -> bool:
    """Return whether a tensor of a state is of a stage that trains ``own``, or of every stage."""
    path = name.partition("/")[2]
    return "." not in path or path in own or path.rpartition(".")[0] in own


def _command(order: TrainingOrder) -> Callable[[int, int], TrainingCommand]:
    batch, tensors = order.batch, order.tensors
    if order.task is Task.FORWARD:
        rows = batch.shape[0]
        tensors = (Tensor("int32", batch.shape, batch.tokens), Tensor("int32", (rows, 2), batch.lengths), *tensors)
    train = batch.purpose is Purpose.TRAIN
    return lambda epoch, number: TrainingCommand(
        epoch,
        number,
        order.task,
        batch.number,
        train,
        order.gradient,
        order.update,
        tensors=tensors,
        weight=batch.weight,
    )
