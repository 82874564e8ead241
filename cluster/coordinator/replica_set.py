"""Hold the replicas of one model: the first, and copies of it that come and go while requests run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any

from cluster.coordinator.model_catalog import COPY_MARK
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.replica import DeploymentHost, Replica
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.router import Router
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import EventKind, ServingState
from cluster.core.errors import MacpipeError, NotServing

log = logging.getLogger(__name__)


class ReplicaSet:
    """The replicas of one deployment. The first one is always there, and holds its slices under the model's name.

    All methods must be called on the event loop that created it.
    """

    def __init__(self, name: str, host: DeploymentHost) -> None:
        self._name, self._host = name, host
        self.all: tuple[Replica, ...] = (self._create_first(),)
        self.router = Router(lambda: self.all)
        self._moves: set[asyncio.Task[None]] = set()
        """Moves of requests, and ends of replicas whose workers stop."""

    def _create_first(self) -> Replica:
        return Replica(self._name, self._name, self._host, self._on_change, self._retire, self._is_copy)

    def _is_copy(self, holder: str) -> bool:
        return holder.startswith(self._name + COPY_MARK)

    @property
    def first(self) -> Replica:
        return self.all[0]

    @property
    def copies(self) -> tuple[Replica, ...]:
        """All replicas but the first, the newest last."""
        return self.all[1:]

    @property
    def state(self) -> ServingState:
        """The state of the replica that is best off."""
        ready = self.router.ready()
        return ready[0].state if ready else ServingState.IDLE

    async def add(
        self,
        model_info: ModelInfo,
        order: LoadOrder,
        report: LoadReporter,
        draft_info: ModelInfo | None,
        macs: Collection[str],
    ) -> Replica:
        """Load one more copy on these workers, none of which others use, and send requests to it from then on.

        Raises ``MacpipeError``; the workers then hold nothing.
        """
        holders = {replica.holder for replica in self.all}
        holder = next(
            name for i in range(2, len(holders) + 3) if (name := f"{self._name}{COPY_MARK}{i}") not in holders
        )
        replica = Replica(holder, self._name, self._host, self._on_change, self._retire, lambda other: True)
        adapters = model_info.adapters.loaded
        gathered = await replica.gather_copy(order, macs)
        placement = await replica.place(model_info, gathered, report, draft_info, needs_draft=False)
        await replica.open(model_info, placement, report)
        if model_info.adapters.loaded != adapters:
            changed = NotServing("the adapters have changed while a copy of the model was loaded")
            await replica.close(changed)
            raise changed
        self.all = (*self.all, replica)
        self._on_change(replica)
        return replica

    async def remove(self, replica: Replica) -> None:
        """Let other replicas go on with the requests of one, then free its workers' memory.

        If it is the first one, the oldest copy takes its place.
        """
        self.all = tuple(one for one in self.all if one is not replica)
        where = ", ".join(replica.workers)
        await asyncio.shield(self._start_move(replica))
        await replica.close(NotServing("this copy of the model was unloaded; send the request again"))
        self._host.timeline.add(EventKind.UNLOAD, f"unloaded the copy of {self._name} on {where}")
        self._host.changed()

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory, also that of all copies."""
        closing = self.all
        self.all = closing[:1] if self.first.holder == self._name else (self._create_first(),)
        for replica in reversed(closing):
            await replica.close(error)
        if self._moves:
            await asyncio.wait(self._moves)

    def _on_change(self, replica: Replica) -> None:
        """Handle that a replica was lost, or serves again: requests go to where they can be answered now."""
        if replica.state is ServingState.SERVING:
            sources = [one for one in self.all if one.state is not ServingState.SERVING]
        else:
            sources = [replica]
        if len(self.all) > 1:
            for source in sources:
                self._start_move(source)
        self._host.changed()

    def _retire(self, replica: Replica) -> bool:
        """End a replica whose worker stops or is lost, if another one goes on with its requests. Return whether."""
        if not self.router.serves_without(replica):
            return False
        if replica in self.all:
            self._keep_task(self.remove(replica))
        return True

    def _start_move(self, source: Replica) -> asyncio.Task[None]:
        return self._keep_task(self.router.move_requests(source))

    def _keep_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._moves.add(task)
        task.add_done_callback(self._on_moved)
        return task

    def _on_moved(self, task: asyncio.Task[None]) -> None:
        self._moves.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("replicas: requests not moved deployment=%s", self._name, exc_info=error)
