"""The coordinator: one cluster, at most one loaded model, and every request on its way.

It holds the state machine idle -> loading -> serving -> failed and hands each step to the module that knows how.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import anyio

from cluster.coordinator.answer import Answer
from cluster.coordinator.checkpoint import Checkpoint, Reader
from cluster.coordinator.epoch import Epoch, Opening, new_epoch
from cluster.coordinator.grammars import GrammarCheck
from cluster.coordinator.layout import Links, lay_out
from cluster.coordinator.links import measured_links
from cluster.coordinator.loop import Totals
from cluster.coordinator.report import Both, LoadReport, Report
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.snapshot import ServingState, Snapshot
from cluster.coordinator.supply import Supply
from cluster.coordinator.views import LoopView
from cluster.errors import Aborted, MacpipeError, ModelNotFound, NotServing, RequestNotFound, WorkerLost
from cluster.limits import CONTROL_TIMEOUT_S, MAX_SCHEMA_BYTES
from cluster.store.store import Store
from cluster.transport.streams import Dialer
from cluster.types import ModelShape, Plan, Request, WorkerFacts


class Coordinator:
    """Lives on one event loop; its methods are called there. ``report`` is told of everything, whoever asked for it."""

    def __init__(
        self,
        cluster: str,
        roster: Roster,
        dialer: Dialer,
        report: Report,
        store: Store,
        max_schema_bytes: int = MAX_SCHEMA_BYTES,
    ) -> None:
        self._cluster, self._roster, self._dialer, self._report = cluster, roster, dialer, report
        self._started = time.monotonic()
        self._totals = Totals()
        self._reader = Reader(store)
        self._supply = Supply(store, roster)
        self._grammars = GrammarCheck(max_schema_bytes)
        self._loading = asyncio.Lock()
        self._epoch: Epoch | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()
        """Set whenever ``state`` may have changed; whoever waits clears it."""

    @property
    def state(self) -> ServingState:
        if self._loading.locked():
            return ServingState.LOADING
        if self._problem:
            return ServingState.FAILED
        return ServingState.SERVING if self._epoch else ServingState.IDLE

    @property
    def _problem(self) -> MacpipeError | None:
        return self._epoch.inquest.error if self._epoch else None

    # Loading

    async def load(self, order: LoadOrder, follower: LoadReport | None = None) -> None:
        """Serve a model instead of what is being served.

        Raises ``MacpipeError``. What is being served stays until there are workers and a plan for the new model; where
        that then cannot be loaded, nothing is served.
        """
        if self._loading.locked():
            raise NotServing("another model is being loaded; wait for it to end")
        report = Both(self._report, follower) if follower else self._report
        async with self._loading:
            self.changed.set()
            try:
                await self._replace(order, report)
            finally:
                self.changed.set()

    async def _replace(self, order: LoadOrder, report: LoadReport) -> None:
        checkpoint = await self._reader.read(order.model, order.max_context, order.kv_bits)
        if self._epoch and not self._problem:
            await self._epoch.teach()  # what is loaded next is planned by what this one showed
        wanted = len(order.layers) if order.layers and order.workers is None else order.workers
        found = await self._roster.gather(wanted, order.wait_s, report)
        plan = await self._lay_out(new_epoch(), checkpoint.shape, found, order)
        report.planned(plan)
        by_name = {w.name: w for w in found}
        workers = tuple(by_name[stage.worker] for stage in plan.stages)
        await self._close(NotServing("another model is being loaded"))
        self._roster.pin(workers)
        controls = [self._roster.control(w.control_address) for w in workers]
        opening = Opening(self._dialer, report.progress, order.max_step_ms, self._supply)
        self._adopt(await opening.open(plan, checkpoint, workers, controls))

    async def plan(self, order: LoadOrder) -> Plan:
        """What ``load`` would do with the workers that are there now; nothing changes. Raises ``MacpipeError``."""
        shape = await self._reader.survey(order.model, order.max_context, order.kv_bits)
        found = await self._roster.present(order.workers)
        return await self._lay_out(0, shape, found, order)

    async def _lay_out(self, number: int, shape: ModelShape, found: Sequence[WorkerFacts], order: LoadOrder) -> Plan:
        """The plan over some of these workers, their links measured where speeds are known at all."""
        workers = found[: len(order.layers)] if order.layers else found
        links: Links = {}
        if len(workers) > 1 and all(w.profile.known for w in workers):
            links = await measured_links(workers, [self._roster.control(w.control_address) for w in workers])
        return await anyio.to_thread.run_sync(lay_out, number, shape, workers, order, links)

    def _adopt(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._heartbeat = asyncio.create_task(epoch.keep())
        epoch.loop.count_into(self._totals)
        epoch.inquest.tell(self._note_failure)

    def _note_failure(self, error: MacpipeError) -> None:
        self.changed.set()
        self._report.problem(f"{error.sentence}; load the model again when the worker is back")

    async def unload(self) -> None:
        """End live requests and free the workers' memory; nothing happens where nothing is loaded."""
        if self._loading.locked():
            raise NotServing("a model is being loaded; wait for it to end")
        async with self._loading:
            await self._close(NotServing("the model was unloaded"))
        self.changed.set()

    async def _close(self, error: MacpipeError) -> None:
        epoch, self._epoch = self._epoch, None
        if self._heartbeat:
            self._heartbeat.cancel()
        if epoch:
            await epoch.close(error)
        self._roster.pin(())

    async def close(self) -> None:
        """Stop: live requests end, workers are told."""
        await self._close(NotServing("the coordinator is stopping"))
        await self._roster.close()
        await anyio.to_thread.run_sync(self._reader.close)

    # Serving

    def checkpoint(self, model: str) -> Checkpoint:
        """The served model. Raises ``NotServing``, and ``ModelNotFound`` where another name is asked for."""
        epoch = self._serving()
        if model and model != epoch.plan.model.name:
            raise ModelNotFound(f"no model {model} is served here; {epoch.plan.model.name} is", field="model")
        return epoch.checkpoint

    def _serving(self) -> Epoch:
        if self._problem:
            worker = self._problem.details.get("worker", "")
            raise MacpipeError.of(WorkerLost.reason, f"the model is not served: {self._problem.sentence}", worker)
        if self._epoch:
            return self._epoch
        if self._loading.locked():
            raise NotServing("a model is being loaded; try again in a moment", retry_after_s=5.0)
        raise NotServing("no model is loaded; load one with `macpipe load MODEL`")

    async def accept(self, request: Request, checkpoint: Checkpoint) -> Answer:
        """``submit``, after making sure that the request's grammar can be enforced (see ``GrammarCheck``).

        Raises ``InvalidGrammar`` with the compiler's reason, and what ``submit`` raises.
        """
        if request.sampling.grammar:
            await self._grammars.check(request.sampling.grammar, checkpoint)
        return self.submit(request, checkpoint)

    def submit(self, request: Request, checkpoint: Checkpoint) -> Answer:
        """Take a request that was made for ``checkpoint``; its answer begins with ``Accepted`` or is an error.

        Raises ``NotServing``, also where another model has been loaded since.
        """
        epoch = self._serving()
        if epoch.checkpoint is not checkpoint:
            raise NotServing("another model was loaded while the prompt was read; send it again")
        answer = Answer(lambda: epoch.loop.end(request.id, Aborted("the client went away")), request.samples)
        epoch.loop.submit(request, answer)
        return answer

    async def abort(self, request_id: str) -> None:
        """End a request wherever it is. Raises ``RequestNotFound``."""
        error = Aborted(f"the request {request_id} was aborted")
        ended = self._serving().loop.end(request_id, error)
        if not await asyncio.wrap_future(ended):
            raise RequestNotFound(f"no live request has the id {request_id}")

    # Looking

    async def snapshot(self) -> Snapshot:
        """Everything, asked afresh."""
        members, loop = await self._roster.refresh(), await self._view()
        epoch, problem = self._epoch, self._problem
        return Snapshot(
            cluster=self._cluster,
            state=self.state,
            problem=problem.sentence if problem else "",
            plan=epoch.plan if epoch else None,
            ring=epoch.ring_stages if epoch else (),
            members=members,
            loop=loop,
            finished=self._totals.finished,
            tokens=self._totals.tokens,
            uptime_s=time.monotonic() - self._started,
        )

    async def under_way(self) -> tuple[Plan | None, LoopView | None]:
        """The plan that is served and what its loop has to do, without asking any worker."""
        plan, loop = self._epoch.plan if self._epoch else None, await self._view()
        return plan, loop

    async def _view(self) -> LoopView | None:
        if self._epoch is None:
            return None
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            return await asyncio.wrap_future(self._epoch.loop.view())
        return None
