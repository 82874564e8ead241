"""Keep as many copies of each served model as its operator wants, on Macs that nobody else uses.

A copy costs nobody anything: it uses only Macs that hold no layer, it is loaded while nothing else is, and a load that
comes meanwhile ends its own. The keeper sleeps until something changes; it does not poll.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import anyio

from cluster.coordinator.copy_plans import NO_MAC, copy_rank
from cluster.coordinator.deployment import Deployment
from cluster.coordinator.joint_planner import ModelToPlace, create_demand
from cluster.coordinator.load_turns import LoadTurns
from cluster.coordinator.neighbours import describe_loaded
from cluster.coordinator.planner import offer_workers
from cluster.coordinator.replica import Replica
from cluster.coordinator.reporter import LoadWatch
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState
from cluster.core.errors import MacpipeError, NoPlan, NoWorkers
from cluster.core.plan import ModelShape
from cluster.core.text import count_in_words
from cluster.placement.arrangement import LoadedModel
from cluster.placement.copies import choose_copies_to_drop
from cluster.placement.memory_split import memory_for

log = logging.getLogger(__name__)

RETRY_S: Final = 60.0
"""Macs on which a copy could not be loaded are left alone for this long, unless they are drained or restarted."""

NO_IDLE: Final = f"{NO_MAC}; start one more worker, or unload another model"


@dataclass(frozen=True, slots=True)
class CopyGoal:
    """How many replicas a model should have, the first one included; None: as many as there are idle Macs for."""

    deployment: Deployment
    most: int | None
    priority: int = 0

    @property
    def is_auto(self) -> bool:
        return self.most is None

    @property
    def is_met(self) -> bool:
        return self.most is not None and len(self.deployment.replicas) >= self.most

    @property
    def is_ready(self) -> bool:
        """Whether the model is served by all its replicas: one that recovers gets idle Macs first."""
        deployment = self.deployment
        if deployment.model_info is None or deployment.is_loading:
            return False
        return all(replica.state is ServingState.SERVING for replica in deployment.replicas)


class CopyKeeper:
    """Loads copies and takes them back, one at a time.

    ``goals`` returns those of all models that are loaded. ``is_blocked`` returns whether nothing may be loaded now.
    ``view`` sees the workers that nobody uses. ``notify`` hears of each copy in a sentence.
    """

    def __init__(
        self,
        goals: Callable[[], Sequence[CopyGoal]],
        is_blocked: Callable[[], bool],
        turns: LoadTurns,
        view: RosterView,
        notify: Callable[[str], None],
    ) -> None:
        self._goals, self._is_blocked, self._turns, self._view, self._notify = goals, is_blocked, turns, view, notify
        self._loading: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._avoided: dict[str, float] = {}
        """Until when each worker is left alone, by its name."""
        self._why_missing: dict[str, str] = {}
        """Why a model got no further copy when one was looked for last, by its own name."""

    def wake(self) -> None:
        """Look again at what is wanted, soon. Does nothing while no copy is wanted, or there."""
        if self._task is None and not any(not goal.is_met or goal.deployment.copies for goal in self._goals()):
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._wake.set()

    def problems(self) -> tuple[str, ...]:
        """Return a sentence about each model that has fewer replicas than its operator asks for by number."""
        return tuple(filter(None, map(self._describe_missing, self._goals())))

    def _describe_missing(self, goal: CopyGoal) -> str:
        """Return how many replicas a model has of how many, and why; "" if none is missing, or nothing was tried."""
        deployment = goal.deployment
        why = self._why_missing.get(deployment.name, "")
        if goal.is_auto or goal.is_met or not why:
            return ""
        return f"{deployment.name} has {len(deployment.replicas)} of {count_in_words(goal.most or 0, 'replica')}: {why}"

    def _note_missing(self, goal: CopyGoal, why: str) -> None:
        """Note why a model got no copy. Tell people the first time only."""
        told = self._describe_missing(goal)
        self._why_missing[goal.deployment.name] = why
        if not told and (sentence := self._describe_missing(goal)):
            self._notify(sentence)

    async def stop_loading(self) -> None:
        """End a load that is under way, and wait until its workers are freed. ``wake`` may begin another one."""
        if self._loading:
            self._loading.cancel()
            await asyncio.wait([self._loading])

    async def close(self) -> None:
        """Stop. What is being loaded is freed; copies that serve stay."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def make_room(self, name: str, order: LoadOrder, shape: ModelShape) -> None:
        """Take back copies of other models, as few as this model needs to be no more in anybody's way than it has to.

        Nothing is taken back if it does not fit even then. Copies that were asked for by number stay.
        """
        await self.stop_loading()
        goals = self._goals()
        copies = {copy.holder: (owner, copy) for owner, copy in newest_first(goals) if owner.name != name}
        if not copies:
            return
        try:
            workers = await self._view.usable(None, 0.0, LoadWatch())
        except MacpipeError as e:
            log.info("copies: none taken back reason=%s deployment=%s", e.sentence, name)
            return
        demand = create_demand(ModelToPlace(name, order, shape), offer_workers(shape, workers, order))
        others = [goal.deployment for goal in goals if goal.deployment.name != name]
        loaded = [_describe(one) for owner in others for one in owner.replicas if one.service]
        for holder in await anyio.to_thread.run_sync(choose_copies_to_drop, demand, loaded, list(copies)) or ():
            owner, copy = copies[holder]
            await self._take_back(owner, copy, name)

    async def give_up_one(self, own: Deployment) -> bool:
        """Take back one copy of another model for one whose layers have no place. Return whether there was one."""
        owner, copy = next(((one, c) for one, c in newest_first(self._goals()) if one is not own), (None, None))
        if owner is None or copy is None:
            return False
        await self._take_back(owner, copy, own.name)
        return True

    async def _take_back(self, owner: Deployment, copy: Replica, name: str) -> None:
        workers = ", ".join(copy.workers)
        await owner.remove_copy(copy)
        self._notify(f"the copy of {owner.name} on {workers} was unloaded, since {name} needs the memory")

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._drop_surplus()
                while not self._is_blocked() and await self._add_one():
                    pass
            except Exception:  # top of the task: it must outlive errors
                log.exception("copies: keeper failed")

    async def _drop_surplus(self) -> None:
        """Take back copies that nobody wants any more, since the catalog has changed."""
        goals = self._goals()
        missing = {goal.deployment.name for goal in goals if not goal.is_met}
        self._why_missing = {name: why for name, why in self._why_missing.items() if name in missing}
        for goal in goals:
            while goal.most is not None and len(goal.deployment.replicas) > max(goal.most, 1):
                await goal.deployment.remove_copy(goal.deployment.copies[-1])

    async def _add_one(self) -> bool:
        """Load one more copy of the model that needs it most. Return whether one was loaded."""
        goals = self._goals()
        wanted = [goal for goal in goals if not goal.is_met]
        if not wanted or not all(goal.is_ready for goal in goals):  # idle workers are for what recovers first
            return False
        idle = await self._find_idle()
        for goal in sorted(wanted, key=lambda one: copy_rank(one.most, len(one.deployment.replicas), one.priority)):
            if not idle:
                self._note_missing(goal, NO_IDLE)
            elif not self._is_blocked() and await self._load(goal, idle):
                return True
        return False

    async def _find_idle(self) -> set[str]:
        now = time.monotonic()
        self._avoided = {name: until for name, until in self._avoided.items() if until > now}
        try:
            found = await self._view.present(None)
        except NoWorkers:
            return set()
        except MacpipeError as e:
            log.info("copies: no worker can be used reason=%s", e.sentence)
            return set()
        return {worker.name for worker in found} - self._avoided.keys()

    async def _load(self, goal: CopyGoal, macs: Collection[str]) -> bool:
        """Load a copy, unless another load wants its turn. Return whether it serves."""
        deployment = goal.deployment
        source = deployment.model_info.shape.model.name if deployment.model_info else ""
        name = deployment.title(source)
        watch = LoadWatch(name, "loading a copy of {}")
        self._loading = loading = asyncio.create_task(self._take_turn(deployment, macs, watch))
        try:
            await asyncio.wait([loading])
        finally:
            await self.stop_loading()
            self._loading = None
        if loading.cancelled():
            log.info("copies: load ended for another one model=%s", name)
            return False
        if error := loading.exception():
            if not isinstance(error, MacpipeError):
                raise error
            self._avoid(deployment, macs, error)
            self._note_missing(goal, error.sentence)
            return False
        workers = ", ".join(worker for copy in deployment.copies[-1:] for worker in copy.workers)
        self._notify(f"{name} is served by {len(deployment.replicas)} replicas now; the new one is on {workers}")
        return True

    async def _take_turn(self, deployment: Deployment, macs: Collection[str], watch: LoadWatch) -> None:
        task = asyncio.current_task()
        assert task
        async with self._turns.take(watch, give_way=task.cancel):
            await deployment.add_copy(macs, watch)

    def _avoid(self, deployment: Deployment, macs: Collection[str], error: MacpipeError) -> None:
        """Leave the worker that failed alone for a while, or all if none is named.

        If there is no plan, there will be none until something changes, which wakes the keeper.
        """
        log.info("copies: none loaded reason=%s deployment=%s", error.sentence, deployment.name)
        if isinstance(error, NoPlan | NoWorkers):
            return
        worker = error.details.get("worker", "")
        self._avoided |= dict.fromkeys([worker] if worker in macs else macs, time.monotonic() + RETRY_S)
        asyncio.get_running_loop().call_later(RETRY_S, self.wake)


def newest_first(goals: Sequence[CopyGoal]) -> list[tuple[Deployment, Replica]]:
    """Return the copies that may be taken back for another model, those first that should go first.

    A copy that was asked for by number stays. Of the others, those of the least important models go first.
    """
    auto = sorted((goal for goal in goals if goal.is_auto), key=lambda goal: goal.priority)
    return [(goal.deployment, copy) for goal in auto for copy in reversed(goal.deployment.copies)]


def _describe(replica: Replica) -> LoadedModel:
    """Return what a replica takes of its workers."""
    plan = replica.require_service().plan
    taken = {stage.worker: memory_for(stage.weight_bytes + stage.cache_bytes) for stage in plan.stages}
    return replace(describe_loaded(replica.holder, [plan]), taken=taken)
