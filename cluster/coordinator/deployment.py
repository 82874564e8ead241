"""Load, serve and unload one model under a name: its replicas, and the requests to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import replace

import anyio

from cluster.coordinator.adapter_changes import AdapterChanges
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_resumption import resume_request
from cluster.coordinator.draft_assignment import read_draft
from cluster.coordinator.frame_history import FramesCopy
from cluster.coordinator.journal import JournaledRequest
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.model_catalog import DEFAULT
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.replica import DeploymentHost, Placement, Replica
from cluster.coordinator.replica_set import ReplicaSet
from cluster.coordinator.reporter import BothReporters, LoadReporter, LoadWatch
from cluster.coordinator.room_question import RoomQuestion
from cluster.coordinator.service import ModelService
from cluster.coordinator.settings import LoadOrder
from cluster.core.adapter import Adapter
from cluster.core.cluster_state import EventKind, ServingState
from cluster.core.errors import BadCheckpoint, MacpipeError, ModelUnsupported, NotServing
from cluster.core.known_tokens import KnownAnswer
from cluster.core.request import Request

__all__ = ["Deployment", "DeploymentHost"]


class Deployment:
    """One model that is loaded, served or neither. All methods must be called on the event loop that created it.

    All replicas share one ``ModelInfo``.
    """

    def __init__(self, name: str, host: DeploymentHost) -> None:
        self.name = name
        self._host = host
        self._loading = asyncio.Lock()
        self.watch = LoadWatch()
        """What the present load, or the last one, does."""
        self._replicas = ReplicaSet(name, host)
        self.model_info: ModelInfo | None = None
        """What is served; None if nothing is."""
        self._order: LoadOrder | None = None
        """What is served, or was served before a training."""
        self.loaded_at = 0.0
        """When the model was loaded last, by the monotonic clock."""
        self._adapters: AdapterChanges | None = None
        self._asked: tuple[LoadOrder, ModelInfo | None] | None = None
        """What copies are loaded by: the order as it was given, and the draft model; None if nothing is served."""

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All replicas, served or not. The first one is loaded first, and unloaded last."""
        return self._replicas.all

    @property
    def first(self) -> Replica:
        return self._replicas.first

    @property
    def copies(self) -> tuple[Replica, ...]:
        """All replicas but the first, the newest last."""
        return self._replicas.copies

    @property
    def services(self) -> tuple[ModelService, ...]:
        """What serves the model now, one service a replica."""
        if self.model_info is None:
            return ()
        return tuple(replica.service for replica in self.replicas if replica.service)

    @property
    def service(self) -> ModelService | None:
        """The service of the first replica that has one; None if nothing is served."""
        return next(iter(self.services), None)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that is served; "" if none is."""
        return self.model_info.shape.model.fingerprint if self.model_info and self.service else ""

    @property
    def is_loading(self) -> bool:
        return self._loading.locked()

    @property
    def state(self) -> ServingState:
        """The deployment's own state: never that a training takes place."""
        if self.is_loading:
            return ServingState.LOADING
        return self._replicas.state if self.model_info else ServingState.IDLE

    @property
    def has_requests(self) -> bool:
        """Whether requests are live or queued."""
        return any(len(service.loop.answers) for service in self.services)

    @property
    def used_at(self) -> float:
        """When the last request ended, or the model was loaded, by the monotonic clock."""
        return max((self.loaded_at, *(service.loop.answers.ended_at for service in self.services)))

    @property
    def order(self) -> LoadOrder | None:
        """The order that loads again what is served, with the adapters of now; None if nothing is."""
        return self.service.adapters.adjust_order(self._order) if self.service and self._order else self._order

    def title(self, source: str) -> str:
        """Return how people hear of the model: by the name that they gave it, else by its source."""
        return self._given_name or source

    @property
    def _given_name(self) -> str:
        return "" if self.name == DEFAULT else self.name

    def alive(self) -> Collection[str]:
        """Return the workers that a frame passed a moment ago."""
        return {worker for service in self.services for worker in service.alive()}

    # Loading

    async def load(self, order: LoadOrder, report: LoadReporter, *, again: bool = False) -> None:
        """Load a model and serve it in place of the current one.

        The current model is served until workers and a plan for the new one are found. If the new model then fails to
        load, nothing is served. ``again``: it was served before, and goes on with the workers that are left of those
        it asks for. Raises ``MacpipeError``.
        """
        async with self._loading:
            self.watch = LoadWatch(self.title(order.model), "loading {} again" if again else "loading {}")
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
            await self._host.planner.require_room(order, self._given_name)
            raise
        model_info = replace(model_info, shape=replace(model_info.shape, given_name=self._given_name))
        try:
            draft_info = await read_draft(self._host.reader, model_info, order)
            placement = await self._open_first(model_info, order, report, draft_info, again=again)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await model_info.close()
            if self.model_info is None:
                self.first.let_go()
            raise
        self.model_info, self._order = model_info, replace(placement.order, cached_contexts=order.cached_contexts)
        self.loaded_at = time.monotonic()
        self._asked = order, draft_info
        self._adapters = AdapterChanges(model_info, lambda: [service.adapters for service in self.services])
        self._host.timeline.add(EventKind.LOAD, f"loaded {self.title(model_info.shape.model.name)}", began=began)

    async def _open_first(
        self,
        model_info: ModelInfo,
        order: LoadOrder,
        report: LoadReporter,
        draft_info: ModelInfo | None,
        *,
        again: bool,
    ) -> Placement:
        """Open the first replica in its turn, in place of what is served. Return where it runs."""
        if self.first.holder != self.name:  # a copy whose first replica is gone sees idle workers only
            await self.close(NotServing("another model is being loaded"))
        for copy in self.copies:  # they would be closed anyway, and the plan counts on their workers
            await self.remove_copy(copy)
        await self._host.make_room(self.name, order, model_info.placed_shape)
        first = self.first
        gathered = await first.gather(model_info, order, report, again=again)
        async with self._host.turns.take(self.watch) as waited:
            if waited:  # the workers may be others by now
                gathered = await first.gather(model_info, order, report, again=again)
            placement = await first.place(model_info, gathered, report, draft_info, needs_draft=not again)
            await self.close(NotServing("another model is being loaded"))
            if first.is_outdated(placement):
                placement = await first.place(model_info, gathered, report, draft_info, needs_draft=not again)
            await first.open(model_info, placement, report)
        return placement

    async def unload(self, may_unload: Callable[[], bool] = lambda: True) -> bool:
        """End live requests and free the workers' memory. Return whether a model was loaded.

        Wait for a load that runs. Then do nothing if ``may_unload`` returns False.
        """
        async with self._loading:
            model_info = self.model_info
            if not may_unload():
                return False
            self.watch = LoadWatch(self.title(self._order.model) if self._order else "", "unloading {}")
            await self.close(NotServing("the model was unloaded"))
            self._order = None
        if model_info:
            self._host.timeline.add(EventKind.UNLOAD, f"unloaded {self.title(model_info.shape.model.name)}")
        self._host.changed()
        return model_info is not None

    async def wait_loaded(self) -> None:
        """Wait until no load of this model runs."""
        async with self._loading:
            return

    async def ask_room(self, order: LoadOrder) -> RoomQuestion:
        """Return the question whether a model would fit on the workers of now. Wait for these as a load does.

        Raises as ``ModelReader.read_shape`` and ``RosterView.usable``.
        """
        watch = LoadWatch(self.title(order.model), "waiting to load {}")
        if not self.is_loading:
            self.watch = watch
        shape = replace(await self._host.reader.read_shape(order), given_name=self._given_name)
        deps = self.first.deps
        workers = await deps.roster.usable(order.wanted_workers, order.wait_s, watch)
        lacks_macs = any(member.problem and not member.outside for member in deps.heartbeat.members())
        return RoomQuestion(shape, order, workers, deps.roster.without(()), self._host.planner.links, lacks_macs)

    async def read_context(self, order: LoadOrder) -> int:
        """Return how many tokens of context a load would promise. Raises as ``ModelReader.read_shape``."""
        return (await self._host.reader.read_shape(order)).max_context

    async def read(self, order: LoadOrder) -> ModelInfo:
        """Read a model with its tokenizer, which the caller closes. Load nothing. Raises as ``ModelReader.read``."""
        return await self._host.reader.read(order)

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory. What was served can be loaded again."""
        model_info, self.model_info = self.model_info, None
        if model_info:
            await model_info.close()
        await self._replicas.close(error)

    async def add_copy(self, macs: Collection[str], report: LoadReporter) -> None:
        """Load one more replica on these workers, none of which others use.

        Raises ``NotServing`` if the model is not served, or another load begins, and as ``ReplicaSet.add``.
        """
        model_info, asked = self.model_info, self._asked
        if model_info is None or asked is None:
            raise NotServing("no model is loaded")
        order, draft_info = asked
        began = time.monotonic()
        replica = await self._replicas.add(model_info, order, report, draft_info, macs)
        if self.model_info is not model_info:
            await replica.close(NotServing("the model was unloaded"))
            raise NotServing("the model was unloaded")
        what = f"loaded a copy of {self.title(model_info.shape.model.name)} on {', '.join(replica.workers)}"
        self._host.timeline.add(EventKind.LOAD, what, began=began)

    def can_lose(self, holder: str) -> bool:
        """Return whether requests go on without the replica of this holder, since another one serves."""
        others = (replica for replica in self.replicas if replica.holder != holder)
        return any(replica.state is ServingState.SERVING for replica in others)

    async def remove_copy(self, replica: Replica) -> None:
        """Let the other replicas go on with a copy's requests, then free its workers' memory."""
        await self._replicas.remove(replica)

    # Requests

    def require_service(self) -> ModelService:
        """Return ``service``. Raises ``NotServing`` if nothing is served."""
        if self.service is None:
            raise NotServing("no model is loaded")
        return self.service

    def serves(self, model_info: ModelInfo) -> bool:
        """Return whether this very load of a model is served."""
        return self.model_info is not None and self.model_info.is_same_load(model_info)

    async def route(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        """Queue a request that was tokenized for ``model_info`` at the replica that is predicted to be done first.

        The returned queue yields ``Accepted`` first, or an error. Raises ``NotServing`` if no model is served, or if
        another model was loaded in the meantime.
        """
        self._require_same(model_info)
        return await self._replicas.router.submit(request)

    def _require_same(self, model_info: ModelInfo) -> None:
        self.require_service()
        if not self.serves(model_info):
            raise NotServing("another model was loaded while the prompt was tokenized; send the request again")

    def resume(self, kept: JournaledRequest, known: KnownAnswer) -> tuple[Request, AnswerQueue]:
        """Resume an answer that a previous coordinator began. Raises as ``resume_request``, and ``NotServing``."""
        self.require_service()
        request, tokens, known = resume_request(kept, known)
        return request, self._replicas.router.least_loaded().submit(request, tokens, known)

    async def add_adapter(self, name: str, folder: str) -> Adapter:
        """Serve the adapter in ``folder``. Raises as ``ModelReader.read_adapter`` and ``AdapterChanges.add``."""
        model_info = self.require_service().model_info
        adapter = await self._host.reader.read_adapter(name, folder, model_info)
        return await self._require_adapters().add(adapter)

    async def remove_adapter(self, name: str) -> int:
        """Remove an adapter. Raises ``NotServing``, and as ``AdapterChanges.remove``."""
        return await self._require_adapters().remove(name)

    def _require_adapters(self) -> AdapterChanges:
        if self._adapters is None or self.model_info is None:
            raise NotServing("no model is loaded")
        return self._adapters

    async def abort(self, request_id: str) -> bool:
        """End a request in any phase. Return whether it was live. Raises ``NotServing``, and as ``Replica.abort``."""
        self.require_service()
        if len(self.replicas) > 1:
            await self._replicas.router.wait_moved()
        for replica in self.replicas:
            if replica.service and await replica.abort(request_id):
                return True
        return False

    async def detach(self, request_id: str, client: str) -> None:
        """End a live request that its client resumes, so that the journal has it. Raises as ``Replica.detach``."""
        if len(self.replicas) > 1:
            await self._replicas.router.wait_moved()
        for replica in self.replicas:
            if replica.service:
                await replica.detach(request_id, client)

    async def copy_frames(self) -> list[FramesCopy]:
        """Return the last frames of each replica, to trace a request. Raises as ``Replica.copy_frames``."""
        self.require_service()
        return [await replica.copy_frames() for replica in self.replicas if replica.service]

    async def view(self) -> LoopView | None:
        """Return the view of the first replica's engine loop, see ``Replica.view``."""
        return await self.first.view()
