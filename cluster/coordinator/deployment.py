"""Load, serve and unload one model under a name: at most one service at a time, and the requests to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio

from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_resumption import take_answer
from cluster.coordinator.cluster_planner import ClusterPlanner
from cluster.coordinator.draft_assignment import assign_draft, read_draft
from cluster.coordinator.frame_history import FramesCopy
from cluster.coordinator.held_slices import adopt_held_slices
from cluster.coordinator.journal import Journal
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.model_reader import ModelInfo, ModelReader
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.replan import Assignment
from cluster.coordinator.reporter import BothReporters, LoadReporter, LoadWatch
from cluster.coordinator.request_timings import LoopTotals
from cluster.coordinator.service import ModelService, open_service
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.worker_gathering import gather_remaining, gather_workers
from cluster.core.adapter import Adapter
from cluster.core.cluster_state import EventKind, ServingState
from cluster.core.errors import (
    Aborted,
    BadCheckpoint,
    DeadlineExceeded,
    MacpipeError,
    ModelUnsupported,
    NoPlan,
    NotServing,
)
from cluster.core.limits import CONTROL_TIMEOUT_S, STATUS_VIEW_S
from cluster.core.request import Request

__all__ = ["Deployment", "DeploymentHost"]


@dataclass(frozen=True, slots=True)
class DeploymentHost:
    """What a deployment needs of its coordinator.

    ``journal`` returns where live requests are recorded, if anywhere. ``changed`` is called whenever the state may have
    changed, ``notify`` with a sentence about each event for people.
    """

    reader: ModelReader
    planner: ClusterPlanner
    deps: ServiceDeps
    totals: LoopTotals
    journal: Callable[[], Journal | None]
    changed: Callable[[], None]
    notify: Callable[[str], None]


class Deployment:
    """One model that is loaded, served or neither. All methods must be called on the event loop that created it."""

    def __init__(self, name: str, host: DeploymentHost) -> None:
        self.name = name
        self._host = host
        self._loading = asyncio.Lock()
        self.watch = LoadWatch()
        """What the present load, or the last one, does."""
        self.service: ModelService | None = None
        self._order: LoadOrder | None = None
        """What is served, or was served before a training."""

    @property
    def is_loading(self) -> bool:
        return self._loading.locked()

    @property
    def state(self) -> ServingState:
        """The deployment's own state: never that a training takes place."""
        if self.is_loading:
            return ServingState.LOADING
        if self.service is None:
            return ServingState.IDLE
        if (recovery := self.service.recovery) is None:
            return ServingState.SERVING
        return ServingState.FAILED if recovery.refused else ServingState.RECOVERING

    @property
    def has_requests(self) -> bool:
        """Whether requests are live or queued."""
        return self.service is not None and len(self.service.loop.answers) > 0

    @property
    def order(self) -> LoadOrder | None:
        """The order that loads again what is served, with the adapters of now; None if nothing is."""
        return self.service.adapters.adjust_order(self._order) if self.service and self._order else self._order

    def alive(self) -> Collection[str]:
        """Return the workers that a frame passed a moment ago."""
        return self.service.alive() if self.service else ()

    # Loading

    async def load(self, order: LoadOrder, report: LoadReporter, *, again: bool = False) -> None:
        """Load a model and serve it in place of the current one.

        The current model is served until workers and a plan for the new one are found. If the new model then fails to
        load, nothing is served. ``again``: it was served before, and goes on with the workers that are left of those
        it asks for. Raises ``MacpipeError``.
        """
        async with self._loading:
            self.watch = LoadWatch(order.model, "loading {} again after the training" if again else "loading {}")
            self._host.changed()
            try:
                await self._replace(order, BothReporters(report, self.watch), again=again)
            finally:
                self._host.changed()

    async def _replace(self, order: LoadOrder, report: LoadReporter, *, again: bool) -> None:
        order.check()
        began = time.monotonic()
        try:
            model_info = await self._host.reader.read(order)
        except (BadCheckpoint, ModelUnsupported):
            await self._host.planner.require_room(order)
            raise
        try:
            draft_info = await read_draft(self._host.reader, model_info, order)
            await self._replace_with(model_info, order, report, draft_info, again=again)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await model_info.close()
            raise
        self._host.deps.timeline.add(EventKind.LOAD, f"loaded {model_info.shape.model.name}", began=began)

    async def _replace_with(
        self,
        model_info: ModelInfo,
        order: LoadOrder,
        report: LoadReporter,
        draft_info: ModelInfo | None,
        *,
        again: bool,
    ) -> None:
        host, deps, shape = self._host, self._host.deps, model_info.placed_shape
        if self.service:
            await self.service.send_step_times()  # the next plan uses the step times measured here
        if again:
            gathered, order = await gather_remaining(deps.roster, order, shape, report)
        else:
            gathered = await gather_workers(deps.roster, order, shape, report)
        found, order = await adopt_held_slices(shape, order, gathered, deps.roster)
        number = deps.epochs.next(m.info.epoch for m in deps.roster.members)
        plan = await host.planner.make_plan(number, shape, found, order)
        report.planned(plan)
        by_name = {w.name: w for w in found}
        workers = tuple(by_name[stage.worker] for stage in plan.stages)
        draft = None
        if draft_info:
            try:
                draft = assign_draft(deps.epochs.next(), model_info, draft_info, gathered, [w.name for w in workers])
            except NoPlan as e:
                if not again:
                    raise
                host.notify(f"{plan.model.name} is served without a draft model: {e.sentence}")
        await self.close(NotServing("another model is being loaded"))
        deps.roster.pin(workers)
        deps.roster.pin_draft(draft.worker if draft else None)
        deps.heartbeat.start()
        service = await open_service(
            deps, model_info, order, Assignment(plan, workers), draft, host.notify, report.progress
        )
        service.loop.answers.totals = host.totals
        service.loop.answers.journal = host.journal()
        self.service, self._order = service, order

    async def unload(self) -> None:
        """End live requests and free the workers' memory. Do nothing if no model is loaded."""
        async with self._loading:
            self.watch = LoadWatch(self._order.model if self._order else "", "unloading {}")
            service = self.service
            await self.close(NotServing("the model was unloaded"))
            self._order = None
        if service:
            name = service.model_info.shape.model.name
            self._host.deps.timeline.add(EventKind.UNLOAD, f"unloaded {name}")
        self._host.changed()

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory. What was served can be loaded again."""
        service, self.service = self.service, None
        if service:
            await service.model_info.close()
            await service.close(error)
        self._host.deps.roster.pin(())
        self._host.deps.roster.pin_draft(None)

    # Requests

    def require_service(self) -> ModelService:
        """Return the service. Raises ``NotServing`` if nothing is served."""
        if self.service is None:
            raise NotServing("no model is loaded")
        return self.service

    def serves(self, model_info: ModelInfo) -> bool:
        """Return whether this very load of a model is served."""
        return self.service is not None and self.service.model_info.is_same_load(model_info)

    def submit(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        """Queue a request that was tokenized for ``model_info``.

        The returned queue yields ``Accepted`` first, or an error. Raises ``NotServing`` if no model is served, or if
        another model was loaded in the meantime.
        """
        service = self.require_service()
        if not self.serves(model_info):
            raise NotServing("another model was loaded while the prompt was tokenized; send the request again")
        answer = service.create_answer(request)
        service.loop.submit(request, answer)
        return answer

    def resume(self, request_id: str, offsets: Sequence[int], client: str) -> tuple[Request, AnswerQueue]:
        """Resume an answer that a previous coordinator began. Raises as ``take_answer``, and ``NotServing``."""
        service = self.require_service()
        request, tokens, skip = take_answer(self._host.journal(), request_id, offsets, client)
        answer = service.create_answer(request)
        service.loop.submit(request, answer, tokens, skip)
        return request, answer

    async def add_adapter(self, name: str, folder: str) -> Adapter:
        """Serve the adapter in ``folder``. Raises as ``ModelReader.read_adapter`` and ``AdapterChanges.add``."""
        service = self.require_service()
        return await service.adapters.add(await self._host.reader.read_adapter(name, folder, service.model_info))

    async def remove_adapter(self, name: str) -> int:
        """Remove an adapter. Raises ``NotServing``, and as ``AdapterChanges.remove``."""
        return await self.require_service().adapters.remove(name)

    async def abort(self, request_id: str) -> bool:
        """End a request in any phase. Return whether it was live. Raises ``DeadlineExceeded`` if the loop is stuck."""
        ended = self.require_service().loop.end(request_id, Aborted(f"the request {request_id} was aborted"))
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
