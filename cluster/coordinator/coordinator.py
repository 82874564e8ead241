"""The coordinator: one cluster, at most one loaded model, and every request on its way.

It holds the state machine idle -> loading -> serving -> failed and hands each step to the module that knows how.
"""

from __future__ import annotations

import asyncio
import logging
import time

import anyio

from cluster.coordinator.answer import Answer
from cluster.coordinator.checkpoint import Checkpoint, read_checkpoint
from cluster.coordinator.diagnosis import diagnose
from cluster.coordinator.epoch import Epoch, Opening
from cluster.coordinator.loop import LoopView, Totals
from cluster.coordinator.report import Report
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.snapshot import ServingState, Snapshot
from cluster.errors import Aborted, MacpipeError, ModelNotFound, NotServing, RequestNotFound, WorkerLost
from cluster.limits import CONTROL_TIMEOUT_S
from cluster.transport.streams import Dialer
from cluster.types import Request

log = logging.getLogger(__name__)


class Coordinator:
    """Lives on one event loop; its methods are called there."""

    def __init__(self, cluster: str, roster: Roster, dialer: Dialer) -> None:
        self._cluster, self._roster, self._dialer = cluster, roster, dialer
        self._started = time.monotonic()
        self._totals = Totals()
        self._loading = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._epoch: Epoch | None = None
        self._problem: MacpipeError | None = None
        self._report: Report | None = None
        self._inquest: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()
        """Set whenever ``state`` may have changed; whoever waits clears it."""

    @property
    def state(self) -> ServingState:
        if self._loading.locked():
            return ServingState.LOADING
        if self._problem:
            return ServingState.FAILED
        return ServingState.SERVING if self._epoch else ServingState.IDLE

    # Loading

    async def load(self, order: LoadOrder, report: Report) -> None:
        """Serve a model instead of what is being served. Raises ``MacpipeError``; then nothing is served."""
        if self._loading.locked():
            raise NotServing("another model is being loaded; wait for it to end")
        async with self._loading:
            self.changed.set()
            try:
                self._epoch = await self._open(order, report)
            finally:
                self.changed.set()
        self._report = report

    async def _open(self, order: LoadOrder, report: Report) -> Epoch:
        checkpoint = await read_checkpoint(order.model, order.max_context)
        await self._close(NotServing("another model is being loaded"))
        wanted = len(order.layers) if order.layers and order.workers is None else order.workers
        workers = await self._roster.gather(wanted, order.wait_s, report)
        controls = [self._roster.control(w.control_address) for w in workers]
        self._roster.pin(workers)
        opening = Opening(self._dialer, report.planned, report.progress, self._broken, self._totals)
        return await opening.open(checkpoint, workers, controls, order)

    async def unload(self) -> None:
        """End live requests and free the workers' memory; nothing happens where nothing is loaded."""
        if self._loading.locked():
            raise NotServing("a model is being loaded; wait for it to end")
        async with self._loading:
            await self._close(NotServing("the model was unloaded"))
        self.changed.set()

    async def _close(self, error: MacpipeError) -> None:
        epoch, self._epoch, self._problem = self._epoch, None, None
        if epoch:
            await epoch.close(error)
        self._roster.pin(())

    async def close(self) -> None:
        """Stop: live requests end, workers are told."""
        await self._close(NotServing("the coordinator is stopping"))
        await self._roster.close()

    def _broken(self, cause: MacpipeError) -> None:
        """The ring is lost; called on the engine loop's thread."""
        self._loop.call_soon_threadsafe(self._begin_inquest, cause)

    def _begin_inquest(self, cause: MacpipeError) -> None:
        self._inquest = asyncio.create_task(self._hold_inquest(cause, self._epoch))

    async def _hold_inquest(self, cause: MacpipeError, epoch: Epoch | None) -> None:
        """Find out who is gone, then end what was live with that."""
        if epoch is None:
            return  # it broke while it was being opened: the canary says so
        error = await diagnose(cause, epoch.plan.stages, epoch.controls)
        epoch.loop.fail(error)
        log.info("%s (seen as: %s)", error.sentence, cause.sentence)
        if epoch is self._epoch:
            self._problem = error
            self.changed.set()
            if self._report:
                self._report.problem(f"{error.sentence}; load the model again when the worker is back")

    # Serving

    def checkpoint(self, model: str) -> Checkpoint:
        """The served model. Raises ``NotServing``, and ``ModelNotFound`` where another name is asked for."""
        epoch = self._serving()
        if model and model != epoch.plan.model.name:
            raise ModelNotFound(f"no model {model} is served here; {epoch.plan.model.name} is", field="model")
        return epoch.checkpoint

    def _serving(self) -> Epoch:
        if self._loading.locked():
            raise NotServing("a model is being loaded; try again in a moment", retry_after_s=5.0)
        if self._problem:
            worker = self._problem.details.get("worker", "")
            raise MacpipeError.of(WorkerLost.reason, f"the model is not served: {self._problem.sentence}", worker)
        if self._epoch is None:
            raise NotServing("no model is loaded; load one with `macpipe load MODEL`")
        return self._epoch

    def submit(self, request: Request) -> Answer:
        """Take a request; its answer begins with ``Accepted`` or is an error. Raises ``NotServing``."""
        loop = self._serving().loop
        answer = Answer(lambda: loop.end(request.id, Aborted("the client went away")))
        loop.submit(request, answer)
        return answer

    async def abort(self, request_id: str) -> None:
        """End a request wherever it is. Raises ``RequestNotFound``."""
        error = Aborted(f"the request {request_id} was aborted")
        ended = asyncio.wrap_future(self._serving().loop.end(request_id, error))
        if not await asyncio.wait_for(ended, CONTROL_TIMEOUT_S):
            raise RequestNotFound(f"no live request has the id {request_id}")

    # Looking

    async def snapshot(self) -> Snapshot:
        """Everything, asked afresh."""
        members, loop = await self._roster.refresh(), await self._view()
        epoch = self._epoch
        return Snapshot(
            cluster=self._cluster,
            state=self.state,
            problem=self._problem.sentence if self._problem else "",
            plan=epoch.plan if epoch else None,
            ring=epoch.ring_stages if epoch else (),
            members=members,
            loop=loop,
            finished=self._totals.finished,
            tokens=self._totals.tokens,
            uptime_s=time.monotonic() - self._started,
        )

    async def _view(self) -> LoopView | None:
        if self._epoch is None:
            return None
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            return await asyncio.wrap_future(self._epoch.loop.view())
        return None
