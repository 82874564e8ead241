"""Run one cluster: the models that it serves, each a ``Deployment``, and one training in their place.

Owns what all deployments share: the workers, the heartbeats, the epoch numbers, the totals and the events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial

import anyio

from cluster import __version__
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_resumption import take_request
from cluster.coordinator.cluster_planner import ClusterPlanner
from cluster.coordinator.copy_keeper import CopyKeeper
from cluster.coordinator.deployment import Deployment, DeploymentHost
from cluster.coordinator.deployment_states import describe_deployments
from cluster.coordinator.deployment_table import DeploymentTable
from cluster.coordinator.draining import drain_worker, refuse_handover, undo_drain
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.frame_history import FramesCopy
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.held_slices import InheritedSlices
from cluster.coordinator.journal_writer import JournalWriter
from cluster.coordinator.load_tasks import LoadTasks
from cluster.coordinator.load_turns import LoadTurns
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.model_catalog import DEFAULT, ModelCatalog
from cluster.coordinator.model_reader import ModelInfo, ModelReader, choose_adapter
from cluster.coordinator.planner import Links
from cluster.coordinator.prefix_disks import OwnersOf, PrefixOwners
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.reporter import BothReporters, LoadReporter, LoadWatch, Reporter
from cluster.coordinator.request_timings import ClusterTotals, SummedTotals
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.roster_refresh import RosterRefresh
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.service import ModelService
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.slice_claims import SliceClaims
from cluster.coordinator.snapshot import describe_adapters, describe_workers, with_plan, with_requests, with_training
from cluster.coordinator.timeline import Timeline
from cluster.coordinator.training_run import TrainingHost, TrainingMode, TrainingRequest
from cluster.coordinator.weight_distribution import WeightDistribution
from cluster.core.adapter import Adapter
from cluster.core.cluster_state import ClusterState, ServingState
from cluster.core.errors import InvalidRequest, MacpipeError, NotServing, RequestNotFound, WorkerLost
from cluster.core.known_tokens import KnownAnswer
from cluster.core.leadership import LeadershipState
from cluster.core.limits import MAX_SCHEMA_BYTES, OVERLOADED_S
from cluster.core.load_limits import LOADED_RETRY_S
from cluster.core.plan import Plan
from cluster.core.request import Grammar, Request
from cluster.core.training_events import TrainingEvent
from cluster.core.worker import WorkerState
from cluster.membership.suspicion import Belief, Standing
from cluster.platform.overload import Lag, no_lag
from cluster.store.store import Store
from cluster.transport.streams import Dialer


class Coordinator:
    """The coordinator of one cluster. All methods must be called on the event loop that created it.

    ``report`` receives every event, no matter which client caused it. ``reader`` is closed with the coordinator.
    """

    def __init__(
        self,
        cluster: str,
        roster: Roster,
        dialer: Dialer,
        report: Reporter,
        store: Store,
        max_schema_bytes: int = MAX_SCHEMA_BYTES,
        epochs: EpochNumbers | None = None,
        lag: Lag = no_lag,
        reader: ModelReader | None = None,
    ) -> None:
        self.journal: JournalWriter | None = None
        """Records live requests so that a restarted coordinator can resume them. Set it before the first load."""
        self.catalog_problem = ""
        """Why the models file is not in effect as it stands; "" if it is."""
        self.make_way: Callable[[str], Awaitable[bool]] | None = None
        """Unloads idle models so that the one with this own name can recover. Returns whether one left."""
        self.leadership: Callable[[], LeadershipState | None] = lambda: None
        """Tells who leads, if there ever was another coordinator."""
        self.hand_over: Callable[[str], Awaitable[str]] = refuse_handover
        """Hands over to the standby of this name, or to any for "". Returns its name. Raises ``NotServing``."""
        self.prefix_owners: OwnersOf = PrefixOwners
        """Tells who may have prefixes on the workers' disks. Set it before the first load."""
        self._cluster, self._roster, self._dialer, self._report = cluster, roster, dialer, report
        self._epochs = epochs or EpochNumbers()
        self._started = time.monotonic()
        self._totals = SummedTotals()
        self._reader = reader or ModelReader(store)
        self._claims = SliceClaims()
        self._turns = LoadTurns()
        self.loads = LoadTasks()
        self.inherited = InheritedSlices(roster, self._claims)
        self._planner = ClusterPlanner(RosterView(roster, DEFAULT, self._claims), self._reader, report)
        self.joint_planner = ClusterPlanner(RosterView(roster, "plans"), self._reader, report)
        """Plans as if nothing was loaded."""
        self._weights = WeightDistribution(store, roster)
        self._max_schema_bytes, self._lag = max_schema_bytes, lag
        self._exclusive = asyncio.Lock()
        """Held by a training, in whose place nothing is served or loaded."""
        self._training = TrainingMode(
            lambda model, follower: self.load(model.order, follower, name=model.name, again=True), self._report_problem
        )
        self._preparation = LoadWatch()
        """What is done before a training begins."""
        self._heartbeat = HeartbeatMonitor(roster, self._on_belief, self._alive, lag)
        self._refresh = RosterRefresh(roster)
        self._timeline = Timeline()
        self.changed = asyncio.Event()
        """Set whenever ``state`` may have changed. The waiter clears it."""
        self._deployments = DeploymentTable(self._create_deployment, self._exclusive.locked)
        idle, goals = RosterView(roster, "copies", self._claims, lambda _: True), self._deployments.copy_goals
        self._copies = CopyKeeper(goals, lambda: self._is_loading, self._turns, idle, self._report_problem)

    @property
    def state(self) -> ServingState:
        if self._training.job:
            return ServingState.TRAINING
        if self._exclusive.locked():
            return ServingState.LOADING
        return self._deployments.state

    @property
    def default_state(self) -> ServingState:
        """What the default model does: it is served while others are loaded, or recover, beside it."""
        return self.state if self._exclusive.locked() else self._deployments[DEFAULT].state

    @property
    def is_busy(self) -> bool:
        """Whether requests are live or Macs are being given work: this Mac must not go to sleep."""
        if self.state in (ServingState.LOADING, ServingState.TRAINING, ServingState.RECOVERING):
            return True
        return any(deployment.has_requests for deployment in self._deployments.values())

    @property
    def links(self) -> Links:
        """The links between workers as they were measured last, by the names (from, to)."""
        return self._planner.links

    def _on_change(self) -> None:
        self.changed.set()
        self._copies.wake()

    def _on_belief(self, belief: Belief) -> None:
        self._on_change()
        returned = belief.standing is Standing.UP and belief.lost_at
        if returned and (sentence := self._timeline.add_return(belief.worker, belief.lost_at[-1])):
            self._report.problem(sentence)
        for service in self._services():
            service.on_belief(belief)
        if self._training.job:
            self._training.job.on_belief(belief)

    def _alive(self) -> Collection[str]:
        return {worker for deployment in self._deployments.values() for worker in deployment.alive()}

    def _services(self) -> list[ModelService]:
        """Return what is served now."""
        return [service for deployment in self._deployments.values() for service in deployment.services]

    def _create_deployment(self, name: str) -> Deployment:
        host = DeploymentHost(
            self._reader,
            self._planner,
            self._create_ring_deps,
            self._turns,
            self.inherited,
            self._deployments.find_neighbours,
            self._copies.make_room,
            self._timeline,
            self._totals,
            lambda: self.journal,
            self._on_change,
            self._report_problem,
        )
        return Deployment(name, host)

    def _create_ring_deps(self, holder: str, avoids: Callable[[str], bool]) -> ServiceDeps:
        deps = self._create_deps(RosterView(self._roster, holder, self._claims, avoids))
        name = partial(self._deployments.name_among_others, holder)
        return replace(deps, take_back=partial(self._free_memory, holder), model_name=name)

    async def _free_memory(self, holder: str) -> bool:
        """Take back a copy, or unload idle models, for a ring without a plan, unless others go on with its requests."""
        own = self._deployments.find_holder(holder)
        if own is None or own.can_lose(holder):
            return False
        return await self._copies.give_up_one(own) or (self.make_way is not None and await self.make_way(own.name))

    def _create_deps(self, roster: RosterView) -> ServiceDeps:
        return ServiceDeps(
            roster,
            self._heartbeat,
            self._dialer,
            self._weights,
            self._epochs,
            lambda: self.prefix_owners(),
            self._timeline,
        )

    # Models by name

    @property
    def deployments(self) -> DeploymentTable:
        """The deployments, and the catalog that names them."""
        return self._deployments

    @property
    def catalog(self) -> ModelCatalog:
        """The models that may be served, and those that are although they are not configured."""
        return self._deployments.catalog

    def adopt_catalog(self, catalog: ModelCatalog) -> None:
        """Serve the models of this catalog from now on. What is loaded and not in it stays until it is unloaded."""
        self._deployments.adopt(catalog)
        self._claims.shared = not self._deployments.is_single
        self._on_change()

    # Loading

    async def load(
        self, order: LoadOrder, follower: LoadReporter | None = None, *, name: str = DEFAULT, again: bool = False
    ) -> None:
        """Load a model and serve it in place of the one with this name, beside all others.

        Loads of several models take turns. Raises ``NotServing`` during a training, or another load of this name, and
        as ``Deployment.load``.
        """
        self._require_no_load(name)
        self._training.problem = ""
        report = BothReporters(self._report, follower) if follower else self._report
        deployment = self._deployments.begin(name, order)
        self._claims.shared = not self._deployments.is_single
        try:
            await self.loads.run(deployment.name, deployment.load(order, report, again=again))
            self._deployments.note_loaded(deployment.name, order)
        finally:
            self._deployments.forget_unloaded()

    @property
    def _is_loading(self) -> bool:
        return self._exclusive.locked() or any(deployment.is_loading for deployment in self._deployments.values())

    def _require_no_load(self, name: str = "") -> None:
        """Raise ``NotServing`` during a training, or a load of the deployment with this name; without one, of any."""
        named = self._deployments.get(name)
        if self._exclusive.locked() or (named.is_loading if named else not name and self._is_loading):
            raise NotServing(f"the cluster is {self.activity}; wait until that ends")

    async def train(
        self, request: TrainingRequest, tell: Callable[[TrainingEvent], None], follower: LoadReporter
    ) -> None:
        """Train adapters, and refuse requests meanwhile. Afterwards, load again what was served.

        ``tell`` is called with each event. Raises ``NotServing`` during a load, or if what was served could not be
        loaded again, and the errors of ``TrainingMode.run``.
        """
        await self._training.wait_restored()
        self._require_no_load()
        self._preparation = LoadWatch(request.order.model, "preparing to train adapters of {}")
        report = BothReporters(self._report, self._preparation)
        deps = self._create_deps(RosterView(self._roster, "training", SliceClaims()))  # it leaves nothing to others
        host = TrainingHost(self._reader, deps, self._planner.make_plan, self._close, report, self.changed)
        async with self._training.report_restored(tell), self._exclusive:
            await self._training.run(host, request, tell, follower, self._deployments.served())

    async def plan(self, order: LoadOrder, *, wait: bool = False, leaving: Collection[str] = ()) -> Plan:
        """Return the plan that ``load`` would use, see ``ClusterPlanner.plan``. Change nothing."""
        return await self._planner.plan(order, wait=wait, leaving=leaving)

    def _report_problem(self, sentence: str) -> None:
        self.changed.set()
        self._report.problem(sentence)

    async def unload(self, name: str = "", *, every: bool = False) -> tuple[str, ...]:
        """End live requests of the model with this name, of the only one without a name, and free the workers' memory.

        A load of it that runs ends with ``LoadEnded``. ``every`` unloads all. Return the public names of what was
        unloaded. Raises ``NotServing`` while adapters are trained, and as ``DeploymentTable.choose``.
        """
        if self._exclusive.locked():
            raise NotServing(f"the cluster is {self.activity}; wait until that ends")
        chosen = self._deployments.values() if every else self._deployments.choose(name)
        await self._copies.stop_loading()
        unloaded = []
        for deployment in chosen:
            shown = self._deployments.public_name(deployment)
            if await self.loads.end(deployment.name) or deployment.model_info:
                unloaded.append(shown)
            await deployment.unload()
        self._deployments.forget_unloaded()
        self._training.problem = ""
        self._on_change()
        return tuple(unloaded)

    async def _close(self, error: MacpipeError) -> None:
        await self._copies.stop_loading()
        for deployment in self._deployments.values():
            await deployment.close(error)

    async def close(self, error: MacpipeError | None = None) -> None:
        """End live requests with ``error``, release the workers and stop."""
        self._deployments.lead_change.end(error := error or NotServing("the coordinator is stopping"))
        await self._training.close()
        await self._copies.close()
        await self._close(error)
        if self.journal:
            await anyio.to_thread.run_sync(self.journal.close)
        await self._heartbeat.close()
        await self._refresh.close()
        await self._roster.close()
        await self._reader.close()

    # Serving

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        """Return the loaded model of this name, with the adapter that ``model`` (``BASE:NAME``) or ``adapter`` names.

        "" is the default model. Raises ``NotServing`` if it is not loaded, ``ModelNotFound`` if there is no such model
        or adapter, and ``InvalidRequest`` if the two name different adapters.
        """
        deployment, named = self._deployments.resolve(model)
        model_info = self._require_loaded(deployment).require_service().model_info
        if named and adapter and named != adapter:
            two = f"model {model[:64]} and adapter {adapter[:64]} are two adapters; name one"
            raise InvalidRequest(two, field="adapter")
        return choose_adapter(model_info, adapter or named, "model" if named else "adapter")

    def _default(self) -> Deployment:
        """Return the default deployment. Raises ``NotServing``, with what the cluster does instead."""
        return self._require_loaded(self._deployments[DEFAULT])

    def _require_loaded(self, deployment: Deployment) -> Deployment:
        """Return the deployment. Raises ``NotServing`` if it serves nothing, with what the cluster does instead."""
        if deployment.service:
            return deployment
        if self._training.job:
            raise self._training.job.refusal()
        if self._is_loading:
            raise NotServing(f"the cluster is {self.activity}; try again in a moment", retry_after_s=LOADED_RETRY_S)
        if not self._deployments.is_single and (name := self._deployments.public_name(deployment)):
            raise NotServing(f"the model {name} is not loaded; load it with `macpipe load {name}`")
        why = f" ({self._training.problem})" if self._training.problem else ""
        raise NotServing(f"no model is loaded{why}; load one with `macpipe load MODEL`")

    @property
    def activity(self) -> str:
        """What a load or a training does or waits for, as a part of a sentence; "" without one."""
        if self._training.job:
            return self._training.job.describe()
        if self._exclusive.locked():
            return self._preparation.sentence
        loads = (deployment.watch.sentence for deployment in self._deployments.values() if deployment.is_loading)
        return ", and ".join(loads)

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        """Check the request's grammar, then queue the request, which was tokenized for ``model_info``.

        Raises as ``check_grammar`` and ``Deployment.route``.
        """
        if request.sampling.grammar:
            await self.check_grammar(request.sampling.grammar, model_info)
        return await self._serving(model_info).route(request, model_info)

    async def check_grammar(self, grammar: Grammar, model_info: ModelInfo) -> None:
        """Raise ``InvalidGrammar`` if the grammar cannot be enforced (see ``ModelInfo.check_grammar``)."""
        await model_info.check_grammar(grammar, self._max_schema_bytes)

    def _serving(self, model_info: ModelInfo) -> Deployment:
        """Return the deployment that serves this very load of a model, else the default one. Raises ``NotServing``."""
        serving = next((d for d in self._deployments.values() if d.serves(model_info)), None)
        return serving or self._default()

    def resume(self, request_id: str, known: KnownAnswer, client: str) -> tuple[Request, ModelInfo, AnswerQueue]:
        """Resume an answer that a previous coordinator began, on the model that gave it.

        Raises as ``take_request`` and ``Deployment.resume``, and ``NotServing`` while that model is not loaded.
        """
        kept = take_request(self.journal, request_id, client)
        deployment = self._deployments.find_answerer(kept)
        request, answer = deployment.resume(kept, known)
        return request, deployment.require_service().model_info, answer

    async def add_adapter(self, name: str, folder: str, model: str = "") -> Adapter:
        """Serve the adapter in ``folder`` with a loaded model. Raises as ``Deployment.add_adapter``."""
        await self._copies.stop_loading()
        return await self._find_loaded(model).add_adapter(name, folder)

    async def remove_adapter(self, name: str, model: str = "") -> int:
        """Remove an adapter of a loaded model. Raises as ``Deployment.remove_adapter``."""
        return await self._find_loaded(model).remove_adapter(name)

    def _find_loaded(self, model: str) -> Deployment:
        """Return the deployment of a loaded model; "" is the default one. Raises ``NotServing``, ``ModelNotFound``."""
        return self._require_loaded(self._deployments.resolve(model)[0])

    def forget_client(self, client: str) -> None:
        """Drop what is kept of a client's earlier answers. Its live requests go on; end them first."""
        for service in self._services():
            service.loop.forget_client(client)

    async def abort(self, request_id: str) -> None:
        """End a request in any phase. Raises ``RequestNotFound``, ``NotServing``, and as ``Deployment.abort``."""
        for deployment in [d for d in self._deployments.values() if d.service] or [self._default()]:
            if await deployment.abort(request_id):
                return
        raise RequestNotFound(f"no live request has the id {request_id}; it may have ended")

    async def copy_frames(self) -> list[FramesCopy]:
        """Return the last frames of all loops, to trace a request. Raises as ``Deployment.copy_frames``."""
        serving = [deployment for deployment in self._deployments.values() if deployment.service]
        return [copy for d in serving or [self._default()] for copy in await d.copy_frames()]

    async def drain(self, worker: str, *, undo: bool = False) -> None:
        """Move a worker's layers to other workers and stop using it; ``undo`` takes it back into use.

        Raises ``WorkerLost`` if no such worker answers. Raises ``NoPlan`` if no other workers can hold its layers; the
        worker then stays in use.
        """
        member = next((m for m in await self.members() if m.info.name == worker), None)
        if member is None or not member.reachable:
            raise WorkerLost(f"no worker named {worker} answers; `macpipe status` lists the workers", worker=worker)
        control = self._roster.control(member.info.control_address)
        await (undo_drain if undo else drain_worker)(worker, control, self._deployments.values())

    async def snapshot(self, *, ask: bool = True) -> ClusterState:
        """Return the state of the whole cluster; without ``ask``, with the workers' answers to the last heartbeats."""
        members = await self.members() if ask or not self._services() else self._heartbeat.members()
        deployment = self._deployments[DEFAULT]
        loop, deployments = await asyncio.gather(deployment.view(), describe_deployments(self._deployments))
        service = deployment.service
        totals = self._totals.sum()
        repair = service.recovery.describe() if service and service.recovery else None
        state = ClusterState(
            cluster=self._cluster,
            version=__version__,
            state=self.state,
            problem=repair.cause if repair else "" if service else self._training.problem,
            activity=self.activity,
            workers=describe_workers((*members, *self._heartbeat.duplicates()), self._heartbeat.beliefs()),
            requests_finished=totals.finished,
            tokens_generated=totals.tokens,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            uptime_seconds=time.monotonic() - self._started,
            repair=repair,
            move=service.move.describe() if service and service.move else None,
            recoveries=self._timeline.recoveries,
            events=self._timeline.describe(),
            warnings=self._warnings(),
            draft_worker=service.draft_worker if service else "",
            lag_seconds=lag_s if (lag_s := self._lag()) >= OVERLOADED_S else 0.0,
            deployments=deployments,
            leadership=self.leadership(),
        )
        if job := self._training.job:
            return with_training(state, job)
        if service and (epoch := service.epoch):
            state = with_plan(state, service.adapters.adjust(epoch.plan), epoch.stages, loop)
            adapters = describe_adapters(service.model_info.adapters.served)
            state = replace(state, speculation=service.speculation, adapters=adapters)
            state = with_requests(state, loop) if loop else state
        return state

    def _warnings(self) -> tuple[str, ...]:
        journal = self.journal.problem if self.journal else ""
        problems = (text for service in self._services() for text in (service.draft_problem, service.disk_problem))
        authority = self._roster.authority_problem
        return tuple(filter(None, (self.catalog_problem, journal, authority, *problems, *self._copies.problems())))

    async def plan_and_view(self) -> tuple[Plan | None, LoopView | None]:
        """Return the served plan and the engine loop's view. Ask no worker."""
        deployment = self._deployments[DEFAULT]
        plan = deployment.service.plan if deployment.service else None
        return plan, await deployment.view()

    def known_workers(self) -> tuple[WorkerState, ...]:
        """Return what the workers said last, and what is believed of them. Ask none."""
        return describe_workers(self._heartbeat.members(), self._heartbeat.beliefs())

    @property
    def totals(self) -> ClusterTotals:
        totals = self._totals.sum()
        return ClusterTotals(totals.tokens, totals.prompt_tokens, totals.cached_tokens, self._timeline.recoveries)

    async def members(self) -> tuple[RosterEntry, ...]:
        """Return every worker within ``STATUS_ASK_S``; while a model is served, from heartbeats."""
        return await self._heartbeat.wait_for_answers() if self._services() else await self._refresh.members()
