"""Run one cluster: at most one loaded model and all requests to it.

Owns the state machine idle -> loading -> serving -> failed, and delegates each step to the module that implements it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import anyio

from cluster import __version__
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.answer_resumption import take_answer
from cluster.coordinator.draft_assignment import assign_draft, read_draft
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.frame_history import FramesCopy
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.held_slices import adopt_held_slices
from cluster.coordinator.journal import Journal
from cluster.coordinator.link_measurement import measure_links
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.model_reader import ModelInfo, ModelReader, choose_model
from cluster.coordinator.planner import Links, make_plan
from cluster.coordinator.prefix_disks import OwnersOf, PrefixOwners
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.replan import Assignment
from cluster.coordinator.reporter import BothReporters, LoadReporter, LoadWatch, Reporter
from cluster.coordinator.request_timings import ClusterTotals, LoopTotals
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.roster_refresh import RosterRefresh
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.service import ModelService, open_service
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.snapshot import describe_adapters, describe_workers, with_plan, with_requests, with_training
from cluster.coordinator.timeline import Timeline
from cluster.coordinator.training_run import TrainingHost, TrainingMode, TrainingRequest
from cluster.coordinator.weight_distribution import WeightDistribution
from cluster.coordinator.worker_gathering import gather_remaining, gather_workers
from cluster.core.adapter import Adapter
from cluster.core.cluster_state import ClusterState, EventKind, ServingState
from cluster.core.errors import (
    Aborted,
    DeadlineExceeded,
    MacpipeError,
    NoPlan,
    NotServing,
    RequestNotFound,
    WorkerLost,
)
from cluster.core.limits import (
    CONTROL_TIMEOUT_S,
    MAX_SCHEMA_BYTES,
    OVERLOADED_S,
    STATUS_VIEW_S,
)
from cluster.core.plan import ModelShape, Plan, Speculation
from cluster.core.request import Grammar, Request
from cluster.core.training_events import TrainingEvent
from cluster.core.worker import WorkerInfo, WorkerState
from cluster.membership.suspicion import Belief, Standing
from cluster.platform.overload import Lag, no_lag
from cluster.store.store import Store
from cluster.transport.streams import Dialer


class Coordinator:
    """The coordinator of one cluster. All methods must be called on the event loop that created it.

    ``report`` receives every event, no matter which client caused it.
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
    ) -> None:
        self.journal: Journal | None = None
        """Records live requests so that a restarted coordinator can resume them. Set it before the first load."""
        self.prefix_owners: OwnersOf = PrefixOwners
        """Tells who may have prefixes on the workers' disks. Set it before the first load."""
        self._cluster, self._roster, self._dialer, self._report = cluster, roster, dialer, report
        self._pinning = RosterView(roster, "default")
        self._epochs = epochs or EpochNumbers()
        self._started = time.monotonic()
        self._totals = LoopTotals()
        self._reader = ModelReader(store)
        self._weights = WeightDistribution(store, roster)
        self._max_schema_bytes = max_schema_bytes
        self._loading = asyncio.Lock()
        self._watch = LoadWatch()
        self._service: ModelService | None = None
        self._order: LoadOrder | None = None
        """What is served, or was served before a training."""
        self._training = TrainingMode(partial(self.load, again=True), self._report_problem)
        self._lag = lag
        self._heartbeat = HeartbeatMonitor(roster, self._on_belief, self._alive, lag)
        self._refresh = RosterRefresh(roster)
        self._timeline = Timeline()
        self.links: Links = {}
        """The links between workers as they were measured last, by the names (from, to)."""
        self.changed = asyncio.Event()
        """Set whenever ``state`` may have changed. The waiter clears it."""

    @property
    def state(self) -> ServingState:
        if self._training.job:
            return ServingState.TRAINING
        if self._loading.locked():
            return ServingState.LOADING
        if self._service is None:
            return ServingState.IDLE
        if (recovery := self._service.recovery) is None:
            return ServingState.SERVING
        return ServingState.FAILED if recovery.refused else ServingState.RECOVERING

    @property
    def is_busy(self) -> bool:
        """Whether requests are live or Macs are being given work: this Mac must not go to sleep."""
        if self.state in (ServingState.LOADING, ServingState.TRAINING, ServingState.RECOVERING):
            return True
        return self._service is not None and len(self._service.loop.answers) > 0

    def _on_belief(self, belief: Belief) -> None:
        self.changed.set()
        returned = belief.standing is Standing.UP and belief.lost_at
        if returned and (sentence := self._timeline.add_return(belief.worker, belief.lost_at[-1])):
            self._report.problem(sentence)
        if self._service:
            self._service.on_belief(belief)
        if self._training.job:
            self._training.job.on_belief(belief)

    def _alive(self) -> Collection[str]:
        return self._service.alive() if self._service else ()

    # Loading

    async def load(self, order: LoadOrder, follower: LoadReporter | None = None, *, again: bool = False) -> None:
        """Load a model and serve it in place of the current one.

        The current model is served until workers and a plan for the new one are found. If the new model then fails to
        load, nothing is served. ``again``: it was served before, and goes on with the workers that are left of those
        it asks for. Raises ``MacpipeError``.
        """
        if self._loading.locked():
            raise NotServing("another model is being loaded or trained; wait until that ends")
        report = BothReporters(self._report, follower) if follower else self._report
        async with self._loading:
            self._training.problem = ""
            self._watch = LoadWatch(order.model, "loading {} again after the training" if again else "loading {}")
            self.changed.set()
            try:
                await self._replace(order, BothReporters(report, self._watch), again=again)
            finally:
                self.changed.set()

    async def _replace(self, order: LoadOrder, report: LoadReporter, *, again: bool) -> None:
        order.check()
        began = time.monotonic()
        model_info = await self._reader.read(order)
        try:
            draft_info = await read_draft(self._reader, model_info, order)
            await self._replace_with(model_info, order, report, draft_info, again=again)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await model_info.close()
            raise
        self._timeline.add(EventKind.LOAD, f"loaded {model_info.shape.model.name}", began=began)

    async def _replace_with(
        self,
        model_info: ModelInfo,
        order: LoadOrder,
        report: LoadReporter,
        draft_info: ModelInfo | None,
        *,
        again: bool,
    ) -> None:
        if self._service:
            await self._service.send_step_times()  # the next plan uses the step times measured here
        if again:
            gathered, order = await gather_remaining(self._pinning, order, model_info.placed_shape, report)
        else:
            gathered = await gather_workers(self._pinning, order, model_info.placed_shape, report)
        found, order = await adopt_held_slices(model_info.placed_shape, order, gathered, self._roster)
        number = self._epochs.next(m.info.epoch for m in self._roster.members)
        plan = await self._make_plan(number, model_info.placed_shape, found, order)
        report.planned(plan)
        by_name = {w.name: w for w in found}
        workers = tuple(by_name[stage.worker] for stage in plan.stages)
        draft = None
        if draft_info:
            try:
                draft = assign_draft(self._epochs.next(), model_info, draft_info, gathered, [w.name for w in workers])
            except NoPlan as e:
                if not again:
                    raise
                self._report_problem(f"{plan.model.name} is served without a draft model: {e.sentence}")
        await self._close(NotServing("another model is being loaded"))
        self._pinning.pin(workers)
        self._pinning.pin_draft(draft.worker if draft else None)
        self._heartbeat.start()
        service = await open_service(
            self._deps(), model_info, order, Assignment(plan, workers), draft, self._report_problem, report.progress
        )
        service.loop.answers.totals = self._totals
        service.loop.answers.journal = self.journal
        self._service, self._order = service, order

    def _deps(self) -> ServiceDeps:
        owners, timeline = self.prefix_owners, self._timeline
        return ServiceDeps(self._pinning, self._heartbeat, self._dialer, self._weights, self._epochs, owners, timeline)

    async def train(
        self, request: TrainingRequest, tell: Callable[[TrainingEvent], None], follower: LoadReporter
    ) -> None:
        """Train adapters, and refuse requests meanwhile. Afterwards, load again what was served.

        ``tell`` is called with each event. Raises ``NotServing`` during a load, or if what was served could not be
        loaded again, and the errors of ``TrainingMode.run``.
        """
        await self._training.wait_restored()
        if self._loading.locked():
            raise NotServing("a model is being loaded or trained; wait until that ends")
        self._watch = LoadWatch(request.order.model, "preparing to train adapters of {}")
        report = BothReporters(BothReporters(self._report, follower), self._watch)
        host = TrainingHost(self._reader, self._deps(), self._make_plan, self._close, self.changed)
        async with self._training.report_restored(tell), self._loading:
            order = self._order
            if self._service and order:
                order = self._service.adapters.adjust_order(order)
            await self._training.run(host, request, tell, report, order)

    async def plan(self, order: LoadOrder, *, wait: bool = False) -> Plan:
        """Return the plan that ``load`` would use with the workers present now. Change nothing.

        With ``wait``, wait for workers as ``load`` does. Raises ``MacpipeError``.
        """
        shape = await self._reader.read_shape(order)
        if wait:
            found = await gather_workers(self._pinning, order, shape, self._report)
        else:
            found = await self._roster.present(order.stage_count)
        return await self._make_plan(0, shape, found, order)

    async def _make_plan(self, number: int, shape: ModelShape, found: Sequence[WorkerInfo], order: LoadOrder) -> Plan:
        """Return a plan over some of these workers. Measure their links if all speeds are known, or to choose one."""
        links: Links = {}
        choice = all(w.profile.known for w in found) or any(w.data_hosts for w in found)
        if len(found) > 1 and choice:
            links = await measure_links(found, [self._roster.control(w.control_address) for w in found])
            known = {member.info.name for member in self._roster.members}
            self.links = {pair: link for pair, link in {**self.links, **links}.items() if known.issuperset(pair)}
        return await anyio.to_thread.run_sync(make_plan, number, shape, found, order, links)

    def _report_problem(self, sentence: str) -> None:
        self.changed.set()
        self._report.problem(sentence)

    async def unload(self) -> None:
        """End live requests and free the workers' memory. Do nothing if no model is loaded.

        Raises ``NotServing`` while a model is being loaded or trained.
        """
        if self._loading.locked():
            raise NotServing("a model is being loaded or trained; wait until that ends")
        async with self._loading:
            service = self._service
            await self._close(NotServing("the model was unloaded"))
            self._order = None
            self._training.problem = ""
        if service:
            self._timeline.add(EventKind.UNLOAD, f"unloaded {service.model_info.shape.model.name}")
        self.changed.set()

    async def _close(self, error: MacpipeError) -> None:
        service, self._service = self._service, None
        if service:
            await service.model_info.close()
            await service.close(error)
        self._pinning.pin(())
        self._pinning.pin_draft(None)

    async def close(self) -> None:
        """End live requests, release the workers and stop."""
        await self._training.close()
        await self._close(NotServing("the coordinator is stopping"))
        await self._heartbeat.close()
        await self._refresh.close()
        await self._roster.close()
        await anyio.to_thread.run_sync(self._reader.close)

    # Serving

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        """Return the served model, with an adapter if one is named. Raises ``NotServing``, and as ``choose_model``."""
        return choose_model(self._require_service().model_info, model, adapter)

    @property
    def speculates(self) -> bool:
        """Whether the served model's tokens may be guessed before they are sampled; False without a model."""
        return self._service is not None and self._service.speculation is not Speculation.OFF

    def _require_service(self) -> ModelService:
        if self._service:
            return self._service
        if self._training.job:
            raise self._training.job.refusal()
        if self._loading.locked():
            raise NotServing(f"the cluster is {self._watch.sentence}; try again in a moment", retry_after_s=5.0)
        why = f" ({self._training.problem})" if self._training.problem else ""
        raise NotServing(f"no model is loaded{why}; load one with `macpipe load MODEL`")

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        """Check the request's grammar, then ``submit`` the request.

        Raises what ``check_grammar`` and ``submit`` raise.
        """
        if request.sampling.grammar:
            await self.check_grammar(request.sampling.grammar, model_info)
        return self.submit(request, model_info)

    async def check_grammar(self, grammar: Grammar, model_info: ModelInfo) -> None:
        """Raise ``InvalidGrammar`` if the grammar cannot be enforced (see ``ModelInfo.check_grammar``)."""
        await model_info.check_grammar(grammar, self._max_schema_bytes)

    def submit(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        """Queue a request that was tokenized for ``model_info``.

        The returned queue yields ``Accepted`` first, or an error. Raises ``NotServing`` if no model is served, or if
        another model was loaded in the meantime.
        """
        service = self._require_service()
        if not service.model_info.is_same_load(model_info):
            raise NotServing("another model was loaded while the prompt was tokenized; send the request again")
        answer = service.create_answer(request)
        service.loop.submit(request, answer)
        return answer

    def resume(self, request_id: str, offsets: Sequence[int], client: str) -> tuple[Request, AnswerQueue]:
        """Resume an answer that a previous coordinator began. Raises as ``take_answer``, and ``NotServing``."""
        service = self._require_service()
        request, tokens, skip = take_answer(self.journal, request_id, offsets, client)
        answer = service.create_answer(request)
        service.loop.submit(request, answer, tokens, skip)
        return request, answer

    async def add_adapter(self, name: str, folder: str) -> Adapter:
        """Serve the adapter in ``folder``. Raises as ``ModelReader.read_adapter`` and ``AdapterChanges.add``."""
        service = self._require_service()
        return await service.adapters.add(await self._reader.read_adapter(name, folder, service.model_info))

    async def remove_adapter(self, name: str) -> int:
        """Remove an adapter. Raises ``NotServing``, and as ``AdapterChanges.remove``."""
        return await self._require_service().adapters.remove(name)

    def forget_client(self, client: str) -> None:
        """Drop what is kept of a client's earlier answers. Its live requests go on; end them first."""
        if self._service:
            self._service.loop.forget_client(client)

    async def abort(self, request_id: str) -> None:
        """End a request in any phase. Raises ``RequestNotFound``, or ``DeadlineExceeded`` if the loop is stuck."""
        error = Aborted(f"the request {request_id} was aborted")
        ended = self._require_service().loop.end(request_id, error)
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                was_live = await asyncio.wrap_future(ended)
        except TimeoutError:
            why = f"request {request_id} did not end within {CONTROL_TIMEOUT_S:.0f} s; the engine loop is stuck"
            raise DeadlineExceeded(why) from None
        if not was_live:
            raise RequestNotFound(f"no live request has the id {request_id}; it may have ended")

    async def copy_frames(self) -> FramesCopy:
        """Return the last frames, to trace a request. Raises ``NotServing``, or ``DeadlineExceeded`` as ``abort``."""
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            return await asyncio.wrap_future(self._require_service().loop.copy_frames())
        raise DeadlineExceeded(f"the engine loop did not answer within {CONTROL_TIMEOUT_S:.0f} s; it is stuck")

    async def drain(self, worker: str, *, undo: bool = False) -> None:
        """Move a worker's layers to other workers and stop using it; ``undo`` takes it back into use.

        Raises ``WorkerLost`` if no such worker answers. Raises ``NoPlan`` if no other workers can hold its layers; the
        worker then stays in use.
        """
        member = next((m for m in await self.members() if m.info.name == worker), None)
        if member is None or not member.reachable:
            raise WorkerLost(f"no worker named {worker} answers; `macpipe status` lists the workers", worker=worker)
        control = self._roster.control(member.info.control_address)
        await control.drain(undo=undo)
        if self._service is None:
            return
        if undo:
            self._service.cancel_move_away(worker)
            return
        try:
            await self._service.move_away(worker)
        except MacpipeError:
            await control.drain(undo=True)
            raise

    # Status

    async def snapshot(self, *, ask: bool = True) -> ClusterState:
        """Return the state of the whole cluster; without ``ask``, with the workers' answers to the last heartbeats."""
        members = await self.members() if ask or not self._service else self._heartbeat.members()
        loop = await self._view()
        service = self._service
        repair = service.recovery.describe() if service and service.recovery else None
        state = ClusterState(
            cluster=self._cluster,
            version=__version__,
            state=self.state,
            problem=repair.cause if repair else "" if service else self._training.problem,
            activity=self._watch.sentence if self.state is ServingState.LOADING else "",
            workers=describe_workers((*members, *self._heartbeat.duplicates()), self._heartbeat.beliefs()),
            requests_finished=self._totals.finished,
            tokens_generated=self._totals.tokens,
            prompt_tokens=self._totals.prompt_tokens,
            cached_tokens=self._totals.cached_tokens,
            uptime_seconds=time.monotonic() - self._started,
            repair=repair,
            move=service.move.describe() if service and service.move else None,
            recoveries=self._timeline.recoveries,
            events=self._timeline.describe(),
            warnings=self._warnings(),
            draft_worker=service.draft_worker if service else "",
            lag_seconds=lag_s if (lag_s := self._lag()) >= OVERLOADED_S else 0.0,
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
        draft = self._service.draft_problem if self._service else ""
        return tuple(filter(None, (journal, draft)))

    async def plan_and_view(self) -> tuple[Plan | None, LoopView | None]:
        """Return the served plan and the engine loop's view. Ask no worker."""
        plan = self._service.plan if self._service else None
        return plan, await self._view()

    def known_workers(self) -> tuple[WorkerState, ...]:
        """Return what the workers said last, and what is believed of them. Ask none."""
        return describe_workers(self._heartbeat.members(), self._heartbeat.beliefs())

    @property
    def totals(self) -> ClusterTotals:
        totals = self._totals
        return ClusterTotals(totals.tokens, totals.prompt_tokens, totals.cached_tokens, self._timeline.recoveries)

    async def members(self) -> tuple[RosterEntry, ...]:
        """Return every worker within ``STATUS_ASK_S``; while a model is served, from heartbeats."""
        return await self._heartbeat.wait_for_answers() if self._service else await self._refresh.members()

    async def _view(self) -> LoopView | None:
        if self._service is None:
            return None
        with anyio.move_on_after(STATUS_VIEW_S), suppress(NotServing):
            return await asyncio.wrap_future(self._service.loop.view())
        return None
