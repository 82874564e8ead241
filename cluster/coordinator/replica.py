"""Run one copy of a deployment's model: place it, open its service, and close it.

A replica is a whole ring with its own loop, recovery and draft. It sees the workers as a holder of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import anyio

from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.cluster_planner import ClusterPlanner
from cluster.coordinator.draft_assignment import DraftAssignment, assign_draft
from cluster.coordinator.frame_history import FramesCopy
from cluster.coordinator.held_slices import InheritedSlices, adopt_held_slices
from cluster.coordinator.journal import AnswerTokens
from cluster.coordinator.journal_writer import JournalWriter
from cluster.coordinator.load_turns import LoadTurns
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.model_reader import ModelInfo, ModelReader
from cluster.coordinator.neighbours import Neighbours
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.replan import Assignment
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.request_timings import SummedTotals
from cluster.coordinator.service import ModelService
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.slice_claims import AllClaims
from cluster.coordinator.timeline import Timeline
from cluster.coordinator.worker_gathering import gather_remaining, gather_workers
from cluster.core.cluster_state import ServingState
from cluster.core.errors import (
    Aborted,
    DeadlineExceeded,
    DoesNotFit,
    MacpipeError,
    NoPlan,
    NotServing,
    NoWorkers,
    StaleEpoch,
    WorkerLost,
)
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import CONTROL_TIMEOUT_S, EPOCH_TRIES, STATUS_VIEW_S
from cluster.core.plan import ModelShape
from cluster.core.request import Request
from cluster.core.text import names_in_words
from cluster.core.worker import WorkerInfo

PLAN_TRIES: Final = 3
"""How often a plan is made again because others claimed memory meanwhile. The worker refuses what is too much."""


@dataclass(frozen=True, slots=True)
class DeploymentHost:
    """What a deployment and its replicas need of their coordinator.

    ``create_deps`` returns what a service needs, for a holder of slices with that name, and the other holders that it
    avoids. ``turns`` orders all loads, and ``find_neighbours`` returns what the deployment with that name shares the
    workers with. ``make_room`` takes copies of other models back for a load. ``journal`` returns where live requests
    are recorded, if anywhere. ``changed`` is called whenever the state may have changed, ``notify`` with a sentence
    about each event for people.
    """

    reader: ModelReader
    planner: ClusterPlanner
    create_deps: Callable[[str, Callable[[str], bool]], ServiceDeps]
    turns: LoadTurns
    inherited: InheritedSlices
    find_neighbours: Callable[[str], Neighbours]
    make_room: Callable[[str, LoadOrder, ModelShape], Awaitable[None]]
    timeline: Timeline
    totals: SummedTotals
    journal: Callable[[], JournalWriter | None]
    changed: Callable[[], None]
    notify: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GatheredWorkers:
    """The workers that a replica may use, and the order for which they suffice."""

    workers: tuple[WorkerInfo, ...]
    order: LoadOrder


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a replica is about to run. ``order`` is narrowed to the slices that were adopted, and to its caches.

    ``others`` is what others had claimed of the workers meanwhile.
    """

    assignment: Assignment
    order: LoadOrder
    draft: DraftAssignment | None
    others: AllClaims


class Replica:
    """One copy of a model that is served or not. All methods must be called on the event loop that created it.

    ``holder`` is the name under which its slices are claimed, ``deployment`` that of the model. ``avoids`` is
    as in ``RosterView``. ``changed`` is called whenever ``state`` changes while it is served, ``retire`` as in
    ``ModelService``.
    """

    def __init__(
        self,
        holder: str,
        deployment: str,
        host: DeploymentHost,
        changed: Callable[[Replica], None],
        retire: Callable[[Replica], bool],
        avoids: Callable[[str], bool],
    ) -> None:
        self.holder, self._deployment = holder, deployment
        self._host, self._changed, self._retire = host, changed, retire
        self.deps = host.create_deps(holder, avoids)
        self.service: ModelService | None = None

    @property
    def state(self) -> ServingState:
        """The replica's own state: never that it is being loaded."""
        if self.service is None:
            return ServingState.IDLE
        if (recovery := self.service.recovery) is None:
            return ServingState.SERVING
        return ServingState.FAILED if recovery.refused else ServingState.RECOVERING

    @property
    def live(self) -> int:
        """The number of live requests."""
        return len(self.service.loop.answers) if self.service else 0

    @property
    def workers(self) -> tuple[str, ...]:
        """The names of the workers that hold its stages, in order."""
        return tuple(stage.worker for stage in self.service.plan.stages) if self.service else ()

    # Loading

    async def gather(
        self, model_info: ModelInfo, order: LoadOrder, report: LoadReporter, *, again: bool
    ) -> GatheredWorkers:
        """Wait for the workers of an order.

        ``again``: the model was served before, and goes on with the workers that are left. Raises ``MacpipeError``.
        """
        if self.service:
            await self.service.send_step_times()  # the plan uses the step times measured here
        roster, shape = self.deps.roster, model_info.placed_shape
        if again:
            return GatheredWorkers(*await gather_remaining(roster, order, shape, report))
        return GatheredWorkers(await gather_workers(roster, order, shape, report), order)

    async def gather_copy(self, order: LoadOrder, macs: Collection[str]) -> GatheredWorkers:
        """Return those workers named in ``macs`` that are present and hold nothing of others.

        Raises ``NoWorkers`` if one is missing.
        """
        found = tuple(w for w in await self.deps.roster.present(None) if w.name in macs)
        if missing := set(macs) - {worker.name for worker in found}:
            raise NoWorkers(f"{names_in_words(sorted(missing))} cannot hold a copy now")
        return GatheredWorkers(found, order)

    async def place(
        self,
        model_info: ModelInfo,
        gathered: GatheredWorkers,
        report: LoadReporter,
        draft_info: ModelInfo | None,
        *,
        needs_draft: bool,
    ) -> Placement:
        """Plan over the gathered workers, with the memory that others leave there now. Change nothing.

        ``needs_draft``: a draft model without a place is an error. Raises ``MacpipeError``.
        """
        deps, shape = self.deps, model_info.placed_shape
        found, order = await adopt_held_slices(shape, gathered.order, gathered.workers, deps.roster)
        self._host.inherited.keep_for(self._host.find_neighbours(self._deployment).coming)
        try:
            assignment, order, others = await self._plan_over(found, shape, order, gathered.workers)
        except DoesNotFit:
            if not self._host.inherited.give_up(self._host.find_neighbours(self._deployment).coming):
                raise
            assignment, order, others = await self._plan_over(found, shape, order, gathered.workers)
        plan = assignment.plan
        report.planned(plan)
        workers = assignment.workers
        draft = None
        if draft_info:
            usable = deps.roster.measure_memory(gathered.workers)
            try:
                draft = assign_draft(deps.epochs.next(), model_info, draft_info, usable, [w.name for w in workers])
            except NoPlan as e:
                if needs_draft:
                    raise
                self._host.notify(f"{shape.title} is served without a draft model: {e.sentence}")
        return Placement(Assignment(plan, workers), order, draft, others)

    async def _plan_over(
        self, found: tuple[WorkerInfo, ...], shape: ModelShape, order: LoadOrder, everyone: Sequence[WorkerInfo]
    ) -> tuple[Assignment, LoadOrder, AllClaims]:
        """Plan with the memory of now. Return the plan, the order that keeps to it, and what others had claimed."""
        deps, host = self.deps, self._host
        for _ in range(PLAN_TRIES):
            others = deps.roster.others
            found, everyone = deps.roster.measure_memory(found), deps.roster.measure_memory(everyone)
            neighbours = host.find_neighbours(self._deployment).without(host.inherited.heirs)
            number = deps.epochs.next(deps.roster.epochs)
            plan, kept = await host.planner.make_plan_beside(number, shape, found, order, everyone, neighbours)
            if deps.roster.others == others:
                break
        by_name = {w.name: w for w in found}
        return Assignment(plan, tuple(by_name[stage.worker] for stage in plan.stages)), kept, others

    def is_outdated(self, placement: Placement) -> bool:
        """Return whether others have claimed or left memory since, such as a recovery of another model."""
        return self.deps.roster.others != placement.others

    async def open(self, model_info: ModelInfo, placement: Placement, report: LoadReporter) -> None:
        """Load the slices and serve the model.

        If a worker refuses the epoch as stale, retry with a number above the one that it holds. Raises ``StaleEpoch``
        if that number is implausible, ``WorkerLost`` after ``EPOCH_TRIES`` tries, and the errors of a load; then it
        holds nothing.
        """
        try:
            await self._open(model_info, placement, report)
        except BaseException:
            self.let_go()
            raise

    async def _open(self, model_info: ModelInfo, placement: Placement, report: LoadReporter) -> None:
        deps, draft = self.deps, placement.draft
        plan, workers = placement.assignment.plan, placement.assignment.workers
        deps.roster.pin(workers)
        deps.roster.pin_draft(draft.worker if draft else None)
        deps.roster.claim_all(plan, workers)
        if draft:
            deps.roster.claim_all(draft.plan, [draft.worker])
        deps.heartbeat.start()
        service = await self._open_service(model_info, placement, report)
        answers, journal = service.loop.answers, self._host.journal()
        answers.totals = self._host.totals.open_loop()
        fingerprint = model_info.shape.model.fingerprint
        if journal:
            answers.journal = journal.open_loop(self._deployment, fingerprint)
            service.loop.post.gate = journal.gate
        self.service = service
        self._host.inherited.settle(self._deployment)

    async def _open_service(self, model_info: ModelInfo, placement: Placement, report: LoadReporter) -> ModelService:
        deps, assignment, draft = self.deps, placement.assignment, placement.draft
        for _ in range(EPOCH_TRIES):
            service = ModelService(
                deps,
                model_info,
                placement.order,
                assignment,
                self._host.notify,
                draft,
                lambda: self._changed(self),
                lambda: self._retire(self),
            )
            try:
                await service.open(lambda at: report.progress(replace(at, model=deps.model_name())))
            except StaleEpoch as e:
                if not deps.epochs.learn_refusal(e):
                    raise
                assignment = replace(assignment, plan=assignment.plan.of_epoch(deps.epochs.next()))
                if draft:
                    draft = replace(draft, plan=draft.plan.of_epoch(deps.epochs.next()))
            else:
                return service
        raise WorkerLost("the workers hold newer epochs than this coordinator can issue; restart the workers")

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory. Do nothing if it is not served."""
        service, self.service = self.service, None
        if service:
            try:
                await service.close(error)
            finally:
                self._host.totals.close_loop(service.loop.answers.totals)
        self.let_go()

    def let_go(self) -> None:
        """Give up the workers, and what was kept there from before a restart."""
        self._host.inherited.settle(self._deployment)
        self.deps.roster.pin(())
        self.deps.roster.pin_draft(None)

    # Requests

    def submit(self, request: Request, tokens: AnswerTokens = (), known: tuple[KnownTokens, ...] = ()) -> AnswerQueue:
        """Queue a request, see ``EngineLoop.submit``. Raises ``NotServing``, and as ``ModelService.create_answer``."""
        service = self.require_service()
        answer = service.create_answer(request)
        service.loop.submit(request, answer, tokens, known)
        return answer

    async def abort(self, request_id: str) -> bool:
        """End a request in any phase. Return whether it was live. Raises ``DeadlineExceeded`` if the loop is stuck."""
        error = Aborted(f"the request {request_id} was aborted")
        return await self._wait_ended(request_id, self.require_service().loop.end(request_id, error))

    async def detach(self, request_id: str, client: str) -> None:
        """End a live request that its client resumes. Raises as ``abort``."""
        error = Aborted(f"the request {request_id} was resumed by another call")
        await self._wait_ended(request_id, self.require_service().loop.detach(request_id, client, error))

    async def _wait_ended(self, request_id: str, ended: Future[bool]) -> bool:
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                return await asyncio.wrap_future(ended)
        except TimeoutError:
            why = f"request {request_id} did not end within {CONTROL_TIMEOUT_S:.0f} s; the engine loop is stuck"
            raise DeadlineExceeded(why) from None

    async def copy_frames(self) -> FramesCopy:
        """Return the last frames, to trace a request. Raises ``NotServing``, or ``DeadlineExceeded`` as ``abort``."""
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            return await asyncio.wrap_future(self.require_service().loop.copy_frames())
        raise DeadlineExceeded(f"the engine loop did not answer within {CONTROL_TIMEOUT_S:.0f} s; it is stuck")

    async def view(self) -> LoopView | None:
        """Return the engine loop's view of itself; None without a service, or if it does not answer in time."""
        if self.service is None:
            return None
        with anyio.move_on_after(STATUS_VIEW_S), suppress(NotServing):
            return await asyncio.wrap_future(self.service.loop.view())
        return None

    def require_service(self) -> ModelService:
        """Return the service. Raises ``NotServing`` if there is none."""
        if self.service is None:
            raise NotServing("no model is loaded")
        return self.service
