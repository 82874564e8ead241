"""Recover from the loss of a stage: open a new epoch and wait for its first token.

A recovery asks the workers, gets the next plan, loads missing slices, links the stages and gives the engine loop a new
ring. After any failure, a second loss included, it tries again with what is known then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from cluster.coordinator.canary import run_canary
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.epoch import Epoch, EpochBuilder
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.loss_diagnosis import diagnose, find_hanging, is_excused, unservable
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.planner import capacity
from cluster.coordinator.replan import Assignment, holds, reassign_layers
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.step_times import StepTimes
from cluster.coordinator.weight_distribution import WeightDistribution
from cluster.core.errors import FrameOverdue, MacpipeError, NoPlan, NoWorkers, StaleEpoch, Unreachable, WorkerLost
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
from cluster.transport.streams import Dialer

log = logging.getLogger(__name__)

EXCUSES = 3
"""Up to this many overdue frames in a row may be caused by an overloaded machine."""
Troubles = asyncio.Queue[MacpipeError]


@dataclass(frozen=True, slots=True)
class ServiceDeps:
    """The dependencies of a service: the cluster's workers, and the means to reach them."""

    roster: Roster
    watch: HeartbeatMonitor
    dialer: Dialer
    supply: WeightDistribution
    epochs: EpochNumbers


@dataclass(frozen=True, slots=True)
class RecoveryContext:
    """The served model and the parts that a recovery uses. ``troubles`` queues failures that are not handled yet."""

    means: ServiceDeps
    checkpoint: ModelInfo
    order: LoadOrder
    opening: EpochBuilder
    loop: EngineLoop
    troubles: Troubles


class Recovery:
    """One recovery from ``epoch`` to the next. ``doing`` describes the current step in words."""

    def __init__(self, site: RecoveryContext, epoch: Epoch, cause: MacpipeError, without: Collection[str] = ()) -> None:
        self._context, self._epoch = site, epoch
        self._without = set(without)
        """Workers that get no layers: they are draining, failed to load, or cannot be reached."""
        self._unreachable_once: set[str] = set()
        """Workers whose data port could not be reached once. After a second failure, they get no layers."""
        self.cause = cause
        self.began = time.monotonic()
        self.doing = "asking the workers"
        self.attempts = 0
        self.switched = False
        """Whether a move has closed the old ring, or has seen it break."""
        self.refused = False
        """Whether live requests were ended, because no plan fits or all tries failed."""
        self._missing_bytes = 0

    @property
    def expected_s(self) -> float:
        """Expected duration in seconds from the beginning, as far as it is known; 0 while it waits for a Mac."""
        rate = self._context.opening.rate
        return 0.0 if self.refused else 1.0 + (self._missing_bytes / rate if rate else 0.0)

    async def run(self) -> Epoch:
        """Try until a token has passed every stage of a new epoch, or until cancelled. Return that epoch."""
        self._context.loop.hold()
        await self._find_cause()
        while True:
            self.attempts += 1
            _drop_all(self._context.troubles)
            try:
                return await self._try_once()
            except (NoPlan, NoWorkers) as e:
                self._on_no_plan(e)
            except _EngineRestarting as e:
                self.doing = e.sentence
            except MacpipeError as e:
                self._on_failed_try(e)
            await asyncio.sleep(RECOVERY_PAUSE_S)

    async def move(self, chosen: Assignment | None = None) -> Epoch:
        """Open the next epoch while the old ring still runs. Slices load first, so requests wait only for the switch.

        Raises ``NoPlan`` or ``NoWorkers`` if the layers cannot be moved, and the errors of a load. If the old ring
        breaks during the load, raises that loss, since requests must not wait for a planned load. After an error,
        nothing has changed unless ``switched``.
        """
        chosen = chosen or self._choose_assignment(self._context.means.watch.members())
        newcomers = {w.name for w in chosen.workers} - {w.name for w in self._epoch.workers}
        pairs = zip(chosen.plan.stages, chosen.workers, strict=True)
        self._missing_bytes = sum(s.weight_bytes for s, w in pairs if not holds(w, s))
        self.doing = f"moving layers to {', '.join(sorted(newcomers)) or 'the remaining workers'}"
        self._context.means.roster.pin((*self._epoch.workers, *chosen.workers))
        try:
            load = self._context.opening.load(chosen.plan, chosen.workers, only=newcomers)
            await self._while_all_live(chosen, load, ring_runs=True)
        except BaseException:
            self._context.means.roster.pin(self._epoch.workers)
            raise
        self.switched = True
        self._context.loop.hold()
        return await self._open(chosen)

    async def _find_cause(self) -> None:
        """Ask the workers that held a stage which of them failed. Reset engines that hang, so that they restart."""
        members = await self._ask_workers()
        plan = self._epoch.plan
        self.cause = diagnose(self.cause, plan, members)
        log.warning("recovery: ring lost reason=%s epoch=%d", self.cause.sentence, plan.epoch)
        patience = self._context.loop.patience
        if patience.overdue <= EXCUSES:  # after more overdue frames, even an engine that computes counts as hung
            members = tuple(m for m in members if not is_excused(m))
        busy_ms = FRAME_FLOOR_S * 500 * patience.growth / 2
        stuck = find_hanging(plan, members, busy_ms) if isinstance(self.cause, FrameOverdue) else None
        unresponsive = {m.facts.name for m in members if m.reachable and m.problem and m.facts.epoch}
        for member in members:
            if member.facts.name == stuck or member.facts.name in unresponsive:
                await self._reset(member)

    async def _reset(self, member: RosterEntry) -> None:
        self.cause = WorkerLost(f"the engine of worker {member.facts.name} hangs", worker=member.facts.name)
        try:
            await self._context.opening.control(member.facts.control_address).reset(self.cause.sentence)
        except MacpipeError as e:
            log.info("recovery: engine not reset reason=%s worker=%s", e.sentence, member.facts.name)

    async def _ask_workers(self) -> tuple[RosterEntry, ...]:
        names = [s.worker for s in self._epoch.plan.stages]
        return await self._context.means.watch.ask(names, time.monotonic())

    async def _try_once(self) -> Epoch:
        members = await self._ask_workers()
        self._await_engines(members)
        chosen = self._choose_assignment(members)
        return await self._open(chosen)

    def _await_engines(self, members: tuple[RosterEntry, ...]) -> None:
        """Raise ``_EngineRestarting`` while a crashed engine restarts, unless it crashes repeatedly."""
        names = {s.worker for s in self._epoch.plan.stages}
        for m in members:
            belief = self._context.means.watch.belief(m.facts.name)
            steady = belief is None or belief.lost_since(time.monotonic() - CRASHES_S) < ENGINE_CRASHES
            if m.facts.name in names and m.problem and m.reachable and steady and self._elapsed < RETURN_S:
                raise _EngineRestarting(f"waiting for the engine of {m.facts.name}: {m.problem}")

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _choose_assignment(self, members: tuple[RosterEntry, ...]) -> Assignment:
        context = self._context
        plan = self._epoch.plan
        number = context.means.epochs.next(m.facts.epoch for m in members)
        return reassign_layers(number, plan, context.checkpoint.shape, context.order, members, self._without)

    async def _open(self, chosen: Assignment) -> Epoch:
        context = self._context
        missing = [s for s, w in zip(chosen.plan.stages, chosen.workers, strict=True) if not holds(w, s)]
        self._missing_bytes = sum(s.weight_bytes for s in missing)
        loads = ", ".join(f"layers {s.layers} on {s.worker}" for s in missing)
        self.doing = f"loading {loads}" if loads else "linking the stages again"
        context.means.roster.pin(chosen.workers)
        await self._while_all_live(chosen, context.opening.load(chosen.plan, chosen.workers))
        epoch = await context.opening.link(chosen.plan, chosen.workers)
        ring = await context.opening.connect(epoch)
        self.doing = "replaying live requests"
        limits = capacity(chosen.plan, context.checkpoint.shape, context.order.max_step_ms)
        pace = StepTimes(context.checkpoint.shape, chosen.plan.stages, [w.profile for w in chosen.workers])
        context.loop.resume(chosen.plan, limits, ring, pace)
        self._epoch = epoch
        patience_s = CANARY_TIMEOUT_S * min(MAX_PATIENCE, 2 ** max(0, self.attempts - 1))
        await run_canary(
            context.loop, epoch.plan, context.checkpoint, context.troubles, context.means.watch, patience_s
        )
        return epoch

    async def _while_all_live(
        self, chosen: Assignment, load: Coroutine[Any, Any, None], *, ring_runs: bool = False
    ) -> None:
        """Run a load, and cancel it if one of its workers is gone, since a stopped Mac never reports an error.

        With ``ring_runs``, the loss of the old ring also ends the load. Raises ``WorkerLost``, that loss, or the load's
        error.
        """
        names = {w.name for w in chosen.workers}
        task = asyncio.create_task(load)
        # retrieves the load's error, which nobody awaits if a loss is raised first
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=RECOVERY_PAUSE_S / 2)
                self._context.means.watch.require(names, "while it was loading")
                if ring_runs and not self._context.troubles.empty():
                    self.switched = True
                    raise self._context.troubles.get_nowait()
            await task
        finally:
            task.cancel()

    def _on_failed_try(self, why: MacpipeError) -> None:
        """Handle a failed try. A worker that answered but failed is left out of the next try.

        End live requests after ``RECOVERY_TRIES`` tries and ``RECOVERY_WAIT_S``.
        """
        log.warning("recovery: attempt failed reason=%s attempt=%d", why.sentence, self.attempts)
        self.doing = f"trying again: {why.sentence}"
        worker = why.details.get("worker")
        if isinstance(why, StaleEpoch):
            self._context.means.epochs.learn_refusal(why)  # the worker is fine; only the epoch number was too small
        elif worker and not isinstance(why, WorkerLost):
            retry_worker = isinstance(why, Unreachable) and worker not in self._unreachable_once
            (self._unreachable_once if retry_worker else self._without).add(worker)
        if not self.refused and self.attempts >= RECOVERY_TRIES and self._elapsed > RECOVERY_WAIT_S:
            self.refused = True
            self._context.loop.refuse(unservable(self.cause, why))

    def _on_no_plan(self, why: MacpipeError) -> None:
        """Handle that no plan fits. Requests wait up to ``RECOVERY_WAIT_S`` and then end; the recovery continues."""
        self.doing = f"waiting for a Mac: {why.sentence}"
        self._without.clear()  # a folder that was missing may have been copied in the meantime
        if not self.refused and self._elapsed > RECOVERY_WAIT_S:
            self.refused = True
            self._context.loop.refuse(unservable(self.cause, why))


class _EngineRestarting(Exception):
    """A crashed engine is restarting, so the recovery waits for it. ``sentence`` says which."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


def _drop_all(troubles: Troubles) -> None:
    while not troubles.empty():
        troubles.get_nowait()
