"""Change the epoch, and recover from the loss of a stage: open a new epoch and wait for its first token.

A recovery asks the workers, gets the next plan, loads missing slices, links the stages and gives the engine loop a new
ring. After any failure, a second loss included, it tries again with what is known then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster.coordinator.canary import run_canary
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.epoch import Epoch, EpochBuilder
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.loss_diagnosis import diagnose, find_hanging, is_excused, unservable, verdicts
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.planner import capacity
from cluster.coordinator.prefix_disks import OwnersOf, PrefixDisks, PrefixOwners
from cluster.coordinator.replan import Assignment, holds, reassign_layers
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.slice_losses import SliceLosses
from cluster.coordinator.step_times import StepTimes
from cluster.coordinator.timeline import Timeline
from cluster.coordinator.weight_distribution import WeightDistribution
from cluster.core.cluster_state import Repair
from cluster.core.errors import FrameOverdue, MacpipeError, NoPlan, NoWorkers, StaleEpoch, Unreachable, WorkerLost
from cluster.core.futures import ignore_error
from cluster.core.limits import (
    CANARY_TIMEOUT_S,
    CRASHES_S,
    ENGINE_CRASHES,
    FRAME_FLOOR_S,
    MAX_PATIENCE,
    RECOVERY_PAUSE_S,
    RECOVERY_TRIES,
    RECOVERY_WAIT_S,
    RETURN_S,
)
from cluster.core.plan import PlannedStage
from cluster.core.text import names_in_words
from cluster.transport.streams import Dialer

log = logging.getLogger(__name__)

EXCUSES = 3
"""Up to this many overdue frames in a row may be caused by an overloaded machine."""
MAX_PAUSES = 10
"""A recovery without a plan waits up to this many times ``RECOVERY_PAUSE_S`` until it tries again."""
Failures = asyncio.Queue[MacpipeError]


async def _take_nothing() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class ServiceDeps:
    """The dependencies of a service: the cluster's workers, the clients that call them, and the listener of events."""

    roster: RosterView
    heartbeat: HeartbeatMonitor
    dialer: Dialer
    weights: WeightDistribution
    epochs: EpochNumbers
    prefix_owners: OwnersOf = PrefixOwners
    timeline: Timeline = field(default_factory=Timeline)
    take_back: Callable[[], Awaitable[bool]] = _take_nothing
    """Frees memory that another model can do without. Returns whether there was any."""
    model_name: Callable[[], str] = lambda: ""
    """Tells what the model is called among others, with the number of the replica if it has several; "" if alone."""

    def name_model(self, sentence: str) -> str:
        """Return a sentence for people that says which model it is about, if there are others."""
        name = self.model_name()
        return f"{name}: {sentence}" if name else sentence

    def members(self) -> tuple[RosterEntry, ...]:
        """Return every worker as the last heartbeats found it, with the service's own slices."""
        return self.roster.focus_entries(self.heartbeat.members())

    async def ask(self, workers: Collection[str]) -> tuple[RosterEntry, ...]:
        """Ask all workers now. Return ``members`` once each of ``workers`` has answered or is gone."""
        return self.roster.focus_entries(await self.heartbeat.ask(workers, time.monotonic()))


@dataclass(frozen=True, slots=True)
class RecoveryContext:
    """The served model and the parts that a recovery uses. ``failures`` queues those that are not handled yet.

    ``draft_worker`` returns the worker that holds the draft model, "" if there is none. It gets layers last.
    """

    deps: ServiceDeps
    model_info: ModelInfo
    order: LoadOrder
    builder: EpochBuilder
    loop: EngineLoop
    failures: Failures
    disks: PrefixDisks
    draft_worker: Callable[[], str]
    losses: SliceLosses = field(default_factory=SliceLosses)
    """Of slices on workers that others share."""


class EpochChange(ABC):
    """The way from ``epoch`` to the next one. ``doing`` describes the current step in words.

    ``without`` names workers that get no layers: they are draining, failed to load, or cannot be reached.
    """

    def __init__(self, context: RecoveryContext, epoch: Epoch, without: Collection[str] = ()) -> None:
        self._context, self._epoch = context, epoch
        self._without = set(without)
        self.began = time.monotonic()
        self.doing = "asking the workers"
        self.attempts = 0
        self.refused = False
        """Whether live requests were ended, because no plan fits or all tries failed."""
        self._missing_bytes = 0

    @property
    @abstractmethod
    def reason(self) -> str:
        """Why the epoch changes, as a sentence for people."""

    @property
    @abstractmethod
    def worker(self) -> str:
        """The name of the worker that is the reason; "" if it is none or several."""

    def describe(self) -> Repair:
        """Return how far it is."""
        return Repair(self.worker, self.reason, self._elapsed, self.doing, self.expected_s, self.attempts)

    @property
    def expected_s(self) -> float:
        """Expected duration in seconds from the beginning, as far as it is known; 0 while it waits for a Mac."""
        rate = self._context.builder.rate
        return 0.0 if self.refused else 1.0 + (self._missing_bytes / rate if rate else 0.0)

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def _title(self) -> str:
        return self._context.model_info.shape.title

    def _choose_assignment(self, members: tuple[RosterEntry, ...]) -> Assignment:
        return self._choose_without(members, self._without)

    def _choose_without(self, members: tuple[RosterEntry, ...], without: Collection[str]) -> Assignment:
        context = self._context
        plan = self._epoch.plan
        number = context.deps.epochs.next(m.info.epoch for m in members)
        last = (context.draft_worker(),)
        shape = context.model_info.placed_shape
        return reassign_layers(number, plan, shape, context.order, members, without, last)

    async def _open(self, chosen: Assignment) -> Epoch:
        context = self._context
        missing = [s for s, w in zip(chosen.plan.stages, chosen.workers, strict=True) if not holds(w, s)]
        self._missing_bytes = sum(s.weight_bytes for s in missing)
        self.doing = self._describe_loads(missing) if missing else "linking the stages again"
        self._on_chosen()
        context.deps.roster.pin(chosen.workers)
        context.deps.roster.claim_all(chosen.plan, chosen.workers)
        await self._while_all_live(chosen, context.builder.load(chosen.plan, chosen.workers))
        epoch = await context.builder.link(chosen.plan, chosen.workers)
        disk = await context.disks.open(epoch, context.builder.edition)
        ring = await context.builder.connect(epoch)
        self.doing = "replaying live requests"
        limits = capacity(chosen.plan, context.model_info.shape, context.order, chosen.workers)
        step_times = StepTimes.of(context.model_info.shape, chosen.plan, chosen.workers)
        context.loop.continue_on(chosen.plan, limits, ring, step_times, disk)
        self._epoch = epoch
        wait_s = CANARY_TIMEOUT_S * min(MAX_PATIENCE, 2 ** max(0, self.attempts - 1))
        await run_canary(context.loop, epoch.plan, context.model_info, context.failures, context.deps.heartbeat, wait_s)
        return epoch

    def _describe_loads(self, missing: Sequence[PlannedStage]) -> str:
        """Describe the loads of stages whose worker does not hold its layers yet."""
        return f"loading {', '.join(f'layers {s.layers} on {s.worker}' for s in missing)}"

    def _on_chosen(self) -> None:
        """Report that the next plan is chosen; ``doing`` says what it needs."""
        log.info("epoch: plan chosen reason=%s step=%s model=%s", self.reason, self.doing, self._title)

    async def _while_all_live(
        self, chosen: Assignment, load: Coroutine[Any, Any, None], check: Callable[[], None] = lambda: None
    ) -> None:
        """Run a load, and cancel it if one of its workers is gone, since a stopped Mac never reports an error.

        ``check`` is called now and then, and may end the load by an error. Raises ``WorkerLost``, that error, or the
        load's error.
        """
        names = {w.name for w in chosen.workers}
        task = asyncio.create_task(load)
        task.add_done_callback(ignore_error)  # nobody awaits the load if a loss is raised first
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=RECOVERY_PAUSE_S / 2)
                self._context.deps.heartbeat.require(names, "while it was loading")
                check()
            await task
        finally:
            task.cancel()


class Recovery(EpochChange):
    """One recovery from the loss of a stage. ``cause`` is the loss.

    ``notify`` hears of each plan that is chosen, and that none can be. ``retire`` is as in ``ModelService``.
    """

    def __init__(
        self,
        context: RecoveryContext,
        epoch: Epoch,
        cause: MacpipeError,
        notify: Callable[[str], None],
        retire: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(context, epoch)
        self.cause = cause
        self._notify, self._retire = notify, retire
        self._waits = False
        """Whether ``notify`` was told that no plan fits, or that an engine restarts."""
        self._lost = 0
        """Number of the plan's workers that no longer hold their stage."""
        self._changed = asyncio.Event()
        self._ended_ranks = False
        self._without_plan = 0
        """Number of tries in a row for which there was no plan, up to ``MAX_PAUSES``."""
        self._unreachable_once: set[str] = set()
        """Workers whose data port could not be reached once. After a second failure, they get no layers."""

    @property
    def reason(self) -> str:
        return self.cause.sentence

    @property
    def worker(self) -> str:
        return self.cause.details.get("worker", "")

    async def run(self) -> Epoch:
        """Try until a token has passed every stage of a new epoch, or until cancelled. Return that epoch."""
        self._context.loop.hold()
        await self._find_cause()
        while True:
            self.attempts += 1
            _drop_all(self._context.failures)
            try:
                return await self._try_once()
            except (NoPlan, NoWorkers) as e:
                if await self._context.deps.take_back():
                    continue
                await self._end_ranks()
                if self._give_up():
                    self._wait_for("other copies of the model go on without it")
                else:
                    self._on_no_plan(e)
                await self._wait_for_change()
                continue
            except _EngineRestarting as e:
                self._wait_for(e.sentence)
            except MacpipeError as e:
                self._on_failed_try(e)
            await asyncio.sleep(RECOVERY_PAUSE_S)

    def notice_change(self) -> None:
        """Try again at once if no plan fitted: a worker is back, or gone."""
        self._changed.set()

    @property
    def pause_s(self) -> float:
        """How long the next try waits for a change if there was no plan: longer each time."""
        return RECOVERY_PAUSE_S * min(1 << self._without_plan, MAX_PAUSES)

    async def _wait_for_change(self) -> None:
        """Wait until a worker is back or gone, or a while: nothing tells when memory becomes free."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pause_s):
                await self._changed.wait()
        self._without_plan = 0 if self._changed.is_set() else min(self._without_plan + 1, MAX_PAUSES)
        self._changed.clear()

    def _describe_loads(self, missing: Sequence[PlannedStage]) -> str:
        whose = {0: "", 1: "its "}.get(self._lost, "their ")
        return f"reloading {whose}layers on {names_in_words(list(dict.fromkeys(s.worker for s in missing)))}"

    def _on_chosen(self) -> None:
        super()._on_chosen()
        self._notify(f"{self.cause.sentence}; {self.doing}")

    def _wait_for(self, sentence: str) -> None:
        self.doing = sentence
        if not self._waits:
            self._waits = True
            self._notify(f"{self.cause.sentence}; {self.doing}")

    async def _find_cause(self) -> None:
        """Ask the workers that held a stage which of them failed. Reset engines that hang, so that they restart."""
        members = await self._ask_workers()
        plan = self._epoch.plan
        self.cause = diagnose(self.cause, plan, members, self._epoch.workers)
        lost = verdicts(plan, members, self._epoch.workers)
        self._lost = len(lost)
        self._count_losses(lost)
        log.warning("recovery: ring lost reason=%s epoch=%d model=%s", self.cause.sentence, plan.epoch, self._title)
        deadlines = self._context.loop.deadlines
        if deadlines.overdue <= EXCUSES:  # after more overdue frames, even an engine that computes counts as hung
            members = tuple(m for m in members if not is_excused(m))
        busy_ms = FRAME_FLOOR_S * 500 * deadlines.growth / 2
        stuck = find_hanging(plan, members, busy_ms) if isinstance(self.cause, FrameOverdue) else None
        unresponsive = {m.info.name for m in members if m.reachable and m.problem and m.info.epoch}
        for member in members:
            if member.info.name == stuck or member.info.name in unresponsive:
                await self._reset(member)

    def _count_losses(self, workers: Iterable[str]) -> None:
        """Count lost slices on workers that others share: there, an engine that crashes is started anew at once."""
        addresses = {worker.name: worker.control_address for worker in self._epoch.workers}
        for worker in workers:
            if worker in addresses and self._context.deps.roster.is_shared(addresses[worker]):
                self._context.losses.add(worker)

    def _choose_assignment(self, members: tuple[RosterEntry, ...]) -> Assignment:
        """Avoid workers on which the slice crashes again and again; without others, try one after a pause."""
        losses = self._context.losses
        crashing = losses.crashing() - self._without
        if crashing:
            try:
                return self._choose_without(members, self._without | crashing)
            except (NoPlan, NoWorkers):
                worker = max(crashing, key=losses.pause_s)
                if (pause_s := losses.pause_s(worker)) > 0:
                    why = f"the engine of {worker} keeps crashing, and no other worker can take its layers"
                    raise NoPlan(f"{why}; it is tried again in {pause_s:.0f} s") from None
        return super()._choose_assignment(members)

    async def _reset(self, member: RosterEntry) -> None:
        self.cause = WorkerLost(f"the engine of worker {member.info.name} hangs", worker=member.info.name)
        try:
            control = self._context.builder.control(member.info.control_address)
            await control.reset(self.cause.sentence, epoch=member.info.epoch)
        except MacpipeError as e:
            log.info("recovery: engine not reset reason=%s worker=%s", e.sentence, member.info.name)

    async def _end_ranks(self) -> None:
        """Kill the engines of groups, which wait for each other in vain until they are loaded again. Done once."""
        plan, pairs = self._epoch.plan, zip(self._epoch.plan.stages, self._epoch.controls, strict=True)
        ranks = [] if self._ended_ranks else [control for stage, control in pairs if stage.spec.ranks > 1]
        self._ended_ranks = True
        calls = (control.reset("the other ranks of its group are lost", epoch=plan.epoch) for control in ranks)
        await asyncio.gather(*calls, return_exceptions=True)

    async def _ask_workers(self) -> tuple[RosterEntry, ...]:
        names = [s.worker for s in self._epoch.plan.stages]
        return await self._context.deps.ask(names)

    async def _try_once(self) -> Epoch:
        members = await self._ask_workers()
        self._await_engines(members)
        chosen = self._choose_assignment(members)
        return await self._open(chosen)

    def _await_engines(self, members: tuple[RosterEntry, ...]) -> None:
        """Raise ``_EngineRestarting`` while a crashed engine restarts, unless it crashes repeatedly."""
        names = {s.worker for s in self._epoch.plan.stages}
        for m in members:
            belief = self._context.deps.heartbeat.belief(m.info.name)
            steady = belief is None or belief.lost_since(time.monotonic() - CRASHES_S) < ENGINE_CRASHES
            if m.info.name in names and m.problem and m.reachable and steady and self._elapsed < RETURN_S:
                raise _EngineRestarting(f"waiting for the engine of {m.info.name}: {m.problem}")

    def _on_failed_try(self, why: MacpipeError) -> None:
        """Handle a failed try. A worker that answered but failed is left out of the next try.

        End live requests after ``RECOVERY_TRIES`` tries and ``RECOVERY_WAIT_S``.
        """
        log.warning("recovery: attempt failed reason=%s attempt=%d model=%s", why.sentence, self.attempts, self._title)
        self.doing = f"trying again: {why.sentence}"
        worker = why.details.get("worker")
        if worker and isinstance(why, WorkerLost):
            self._count_losses([worker])
        if isinstance(why, StaleEpoch):
            self._context.deps.epochs.learn_refusal(why)  # the worker is fine; only the epoch number was too small
        elif worker and not isinstance(why, WorkerLost):
            retry_worker = isinstance(why, Unreachable) and worker not in self._unreachable_once
            (self._unreachable_once if retry_worker else self._without).add(worker)
        if not self.refused and self.attempts >= RECOVERY_TRIES and self._elapsed > RECOVERY_WAIT_S:
            self.refused = True
            self._context.loop.refuse(unservable(self.cause, why))

    def _give_up(self) -> bool:
        """Return whether the service is about to be closed, since other copies of the model go on.

        One whose engine keeps crashing is not given up: a copy that is loaded anew would crash as often.
        """
        return not self._context.losses.crashing() and self._retire()

    def _on_no_plan(self, why: MacpipeError) -> None:
        """Handle that no plan fits. Requests wait up to ``RECOVERY_WAIT_S`` and then end; the recovery continues."""
        self._wait_for(f"waiting for a Mac: {why.sentence}")
        self._without.clear()  # a folder that was missing may have been copied in the meantime
        if not self.refused and self._elapsed > RECOVERY_WAIT_S:
            self.refused = True
            self._context.loop.refuse(unservable(self.cause, why))


class _EngineRestarting(Exception):
    """A crashed engine is restarting, so the recovery waits for it. ``sentence`` says which."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


def _drop_all(failures: Failures) -> None:
    while not failures.empty():
        failures.get_nowait()
