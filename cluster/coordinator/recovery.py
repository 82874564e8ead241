"""A recovery: from the loss of a stage to the first token through the stages of a new epoch.

It looks who is there, has the next plan decided, loads what is missing, links, and hands the engine loop its new ring.
Whatever fails on the way, a second loss too, is another try with what is known then.
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
"""So many overdue frames in a row may be an overloaded machine's doing."""
Troubles = asyncio.Queue[MacpipeError]


@dataclass(frozen=True, slots=True)
class ServiceDeps:
    """What a service works with: the cluster's workers, and how to reach them."""

    roster: Roster
    watch: HeartbeatMonitor
    dialer: Dialer
    supply: WeightDistribution
    epochs: EpochNumbers


@dataclass(frozen=True, slots=True)
class RecoveryContext:
    """The model that is served, and what keeps it going. ``troubles`` has what went wrong and was not looked into."""

    means: ServiceDeps
    checkpoint: ModelInfo
    order: LoadOrder
    opening: EpochBuilder
    loop: EngineLoop
    troubles: Troubles


class Recovery:
    """One way from ``epoch``, whose ring is lost, to the next. ``doing`` says in words what it is at."""

    def __init__(self, site: RecoveryContext, epoch: Epoch, cause: MacpipeError, without: Collection[str] = ()) -> None:
        self._site, self._epoch = site, epoch
        self._without = set(without)
        """Who is given no layers: those who leave, who could not load theirs, or who cannot be reached."""
        self._missed: set[str] = set()
        """Whose data port could not be reached once: a second time, and somebody else gets the layers."""
        self.cause = cause
        self.began = time.monotonic()
        self.doing = "looking who is there"
        self.attempts = 0
        self.switched = False
        """Whether a move has taken the old ring down, or seen it break."""
        self.refused = False
        """Whether live requests have ended because nothing fits."""
        self._missing_bytes = 0

    @property
    def expected_s(self) -> float:
        """How long it should take from its beginning, as far as that is known; 0 where it waits for a Mac."""
        rate = self._site.opening.rate
        return 0.0 if self.refused else 1.0 + (self._missing_bytes / rate if rate else 0.0)

    async def run(self) -> Epoch:
        """Returns once a token has gone through every stage of the new epoch; as often as it takes, until cancelled."""
        self._site.loop.hold()
        await self._find_cause()
        while True:
            self.attempts += 1
            _forget(self._site.troubles)
            try:
                return await self._try()
            except (NoPlan, NoWorkers) as e:
                self._wait_for_macs(e)
            except _EngineReturns as e:
                self.doing = e.sentence
            except MacpipeError as e:
                self._try_otherwise(e)
            await asyncio.sleep(RECOVERY_PAUSE_S)

    async def move(self, chosen: Assignment | None = None) -> Epoch:
        """The same while the old ring still runs: slices are loaded first, and requests wait for the switch alone.

        Raises ``NoPlan`` or ``NoWorkers`` where the layers cannot go elsewhere, and what a load raises. Raises the loss
        where the old ring breaks meanwhile: requests do not wait for a planned load. Unless ``switched``, nothing has
        changed then.
        """
        chosen = chosen or self._chosen(self._site.means.watch.members())
        strangers = {w.name for w in chosen.workers} - {w.name for w in self._epoch.workers}
        pairs = zip(chosen.plan.stages, chosen.workers, strict=True)
        self._missing_bytes = sum(s.weight_bytes for s, w in pairs if not holds(w, s))
        self.doing = f"moving layers to {', '.join(sorted(strangers)) or 'those who stay'}"
        self._site.means.roster.pin((*self._epoch.workers, *chosen.workers))
        try:
            load = self._site.opening.load(chosen.plan, chosen.workers, only=strangers)
            await self._while_all_live(chosen, load, ring_runs=True)
        except BaseException:
            self._site.means.roster.pin(self._epoch.workers)
            raise
        self.switched = True
        self._site.loop.hold()
        return await self._open(chosen)

    async def _find_cause(self) -> None:
        """Ask everybody who held a stage; what hangs is killed, so that it can come back."""
        members = await self._ask_workers()
        plan = self._epoch.plan
        self.cause = diagnose(self.cause, plan, members)
        log.warning("the ring of epoch %d is lost: %s", plan.epoch, self.cause.sentence)
        patience = self._site.loop.patience
        if patience.overdue <= EXCUSES:  # an engine that was slow so often hangs, whatever it computes
            members = tuple(m for m in members if not is_excused(m))
        busy_ms = FRAME_FLOOR_S * 500 * patience.growth / 2
        stuck = find_hanging(plan, members, busy_ms) if isinstance(self.cause, FrameOverdue) else None
        mute = {m.facts.name for m in members if m.reachable and m.problem and m.facts.epoch}
        for member in members:
            if member.facts.name == stuck or member.facts.name in mute:
                await self._reset(member)

    async def _reset(self, member: RosterEntry) -> None:
        self.cause = WorkerLost(f"the engine of worker {member.facts.name} hangs", worker=member.facts.name)
        try:
            await self._site.opening.control(member.facts.control_address).reset(self.cause.sentence)
        except MacpipeError as e:
            log.info("could not reset an engine: %s", e.sentence)

    async def _ask_workers(self) -> tuple[RosterEntry, ...]:
        mine = [s.worker for s in self._epoch.plan.stages]
        return await self._site.means.watch.ask(mine, time.monotonic())

    async def _try(self) -> Epoch:
        members = await self._ask_workers()
        self._await_engines(members)
        chosen = self._chosen(members)
        return await self._open(chosen)

    def _await_engines(self, members: tuple[RosterEntry, ...]) -> None:
        """Raise while a crashed engine is on its way back, unless it crashes all the time."""
        mine = {s.worker for s in self._epoch.plan.stages}
        for m in members:
            belief = self._site.means.watch.belief(m.facts.name)
            steady = belief is None or belief.lost_since(time.monotonic() - CRASHES_S) < ENGINE_CRASHES
            if m.facts.name in mine and m.problem and m.reachable and steady and self._elapsed < RETURN_S:
                raise _EngineReturns(f"waiting for the engine of {m.facts.name}: {m.problem}")

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _chosen(self, members: tuple[RosterEntry, ...]) -> Assignment:
        site, plan = self._site, self._epoch.plan
        number = site.means.epochs.next(m.facts.epoch for m in members)
        return reassign_layers(number, plan, site.checkpoint.shape, site.order, members, self._without)

    async def _open(self, chosen: Assignment) -> Epoch:
        site = self._site
        missing = [s for s, w in zip(chosen.plan.stages, chosen.workers, strict=True) if not holds(w, s)]
        self._missing_bytes = sum(s.weight_bytes for s in missing)
        loads = ", ".join(f"layers {s.layers} on {s.worker}" for s in missing)
        self.doing = f"loading {loads}" if loads else "linking the stages anew"
        site.means.roster.pin(chosen.workers)
        await self._while_all_live(chosen, site.opening.load(chosen.plan, chosen.workers))
        epoch = await site.opening.link(chosen.plan, chosen.workers)
        ring = await site.opening.connect(epoch)
        self.doing = "bringing live requests back"
        limits = capacity(chosen.plan, site.checkpoint.shape, site.order.max_step_ms)
        pace = StepTimes(site.checkpoint.shape, chosen.plan.stages, [w.profile for w in chosen.workers])
        site.loop.resume(chosen.plan, limits, ring, pace)
        self._epoch = epoch
        patience_s = CANARY_TIMEOUT_S * min(MAX_PATIENCE, 2 ** max(0, self.attempts - 1))
        await run_canary(site.loop, epoch.plan, site.checkpoint, site.troubles, site.means.watch, patience_s)
        return epoch

    async def _while_all_live(
        self, chosen: Assignment, load: Coroutine[Any, Any, None], *, ring_runs: bool = False
    ) -> None:
        """Carry a load out, unless one of its workers goes: a stopped Mac never says that it has failed.

        While the old ring still runs (``ring_runs``), its loss ends the load too.
        """
        names = {w.name for w in chosen.workers}
        task = asyncio.create_task(load)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a loss that was seen first is told
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=RECOVERY_PAUSE_S / 2)
                self._site.means.watch.require(names, "while it was loading")
                if ring_runs and not self._site.troubles.empty():
                    self.switched = True
                    raise self._site.troubles.get_nowait()
            await task
        finally:
            task.cancel()

    def _try_otherwise(self, why: MacpipeError) -> None:
        """A try has failed. Who was there and could not do it is left out of the next one."""
        log.warning("recovery, attempt %d: %s", self.attempts, why.sentence)
        self.doing = f"trying again: {why.sentence}"
        worker = why.details.get("worker")
        if isinstance(why, StaleEpoch):
            self._site.means.epochs.learn_refusal(why)  # the worker is fine, the number was too small
        elif worker and not isinstance(why, WorkerLost):
            patient = isinstance(why, Unreachable) and worker not in self._missed
            (self._missed if patient else self._without).add(worker)
        if not self.refused and self.attempts >= RECOVERY_TRIES and self._elapsed > RECOVERY_WAIT_S:
            self.refused = True
            self._site.loop.refuse(unservable(self.cause, why))

    def _wait_for_macs(self, why: MacpipeError) -> None:
        """Nothing fits now. Requests wait for a while; then they end, and serving waits on without them."""
        self.doing = f"waiting for a Mac: {why.sentence}"
        self._without.clear()  # a folder that was missing may have been copied in the meantime
        if not self.refused and self._elapsed > RECOVERY_WAIT_S:
            self.refused = True
            self._site.loop.refuse(unservable(self.cause, why))


class _EngineReturns(Exception):
    """A crashed engine is being started again: nothing else is tried meanwhile. ``sentence`` says so."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


def _forget(troubles: Troubles) -> None:
    while not troubles.empty():
        troubles.get_nowait()
