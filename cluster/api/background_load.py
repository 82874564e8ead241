"""Loads a model for a client that does not wait for it, and keeps the progress of any load for people who watch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_catalog import DEFAULT
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState
from cluster.core.errors import MacpipeError, NotServing
from cluster.core.limits import CONTROL_TIMEOUT_S
from cluster.core.plan import LoadProgress, Plan
from cluster.core.worker import WorkerInfo


@dataclass(frozen=True, slots=True)
class LoadState:
    """A load that runs, or ``problem``: why the last one that ran in the background failed.

    ``workers_found`` of ``workers_wanted`` usable workers are there; None if as many are used as are best.
    """

    model: str = ""
    workers_found: int = 0
    workers_wanted: int | None = None
    stages: tuple[LoadProgress, ...] = ()
    problem: str = ""


class LoadTracker:
    """A reporter that keeps the progress of the present load, and passes everything on to ``report``."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self.state = LoadState()

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        self.state = LoadState(workers_found=sum(not one.draining for one in found), workers_wanted=wanted)
        self._report.waiting(found, wanted)

    def planned(self, plan: Plan) -> None:
        stages = tuple(LoadProgress(s.worker, s.layers, 0, s.weight_bytes, "waiting") for s in plan.stages)
        self.state = LoadState(plan.model.name, len(stages), len(stages), stages)
        self._report.planned(plan)

    def progress(self, progress: LoadProgress) -> None:
        stages = tuple(progress if s.worker == progress.worker else s for s in self.state.stages)
        self.state = replace(self.state, stages=stages)
        self._report.progress(progress)

    def serving(self, addresses: Sequence[str], plan: Plan, http: str, names: Sequence[str] = ()) -> None:
        self._report.serving(addresses, plan, http, names)

    def problem(self, sentence: str) -> None:
        self._report.problem(sentence)


class BackgroundLoad:
    """Loads models of one coordinator; ``tracker`` follows its loads, whoever asked for them.

    ``on_demand`` makes room for them; None if nothing does.
    """

    def __init__(
        self, coordinator: Coordinator, tracker: LoadTracker | None = None, on_demand: OnDemand | None = None
    ) -> None:
        self._coordinator = coordinator
        self._on_demand = on_demand
        self._tracker = tracker
        self._task: asyncio.Task[None] | None = None
        self._problem = ""

    def start(self, order: LoadOrder, name: str = DEFAULT) -> None:
        """Begin to load a model under a name of the catalog.

        Raises ``NotServing`` while a model is being loaded or trained.
        """
        if self._task or self._coordinator.state in (ServingState.LOADING, ServingState.TRAINING):
            activity = self._coordinator.activity or "loading another model"
            raise NotServing(f"the cluster is {activity}; wait until that ends")
        order.check()
        self._problem = ""
        self._task = asyncio.create_task(self._run(order, name))

    def state(self) -> LoadState | None:
        """Return the present load, or the failure of the last one; None if there is neither."""
        if self._coordinator.state is ServingState.LOADING:
            return self._tracker.state if self._tracker else LoadState()
        return LoadState(problem=self._problem) if self._problem else None

    async def close(self) -> None:
        """End the load, if one runs."""
        if self._task:
            self._task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((self._task,), timeout=CONTROL_TIMEOUT_S)

    async def _run(self, order: LoadOrder, name: str) -> None:
        try:
            await (self._on_demand or self._coordinator).load(order, name=name)
        except MacpipeError as e:
            self._problem = e.sentence
        finally:
            self._task = None
