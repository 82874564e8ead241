"""Who is to blame when the ring breaks: a stream that ends tells which neighbour saw it, not which Mac is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import anyio

from cluster.coordinator.controls import WorkerControl
from cluster.errors import MacpipeError, WorkerLost
from cluster.limits import DESCRIBE_TIMEOUT_S
from cluster.types import PlannedStage

log = logging.getLogger(__name__)

Told = Callable[[MacpipeError], None]


class Inquest:
    """Waits for one epoch's ring to break, finds out who is gone, and tells everybody whom it concerns, once.

    ``error`` is what was found; None while nothing broke. Made on the event loop; ``begin`` may be called anywhere.
    """

    def __init__(self, stages: Sequence[PlannedStage], controls: Sequence[WorkerControl]) -> None:
        self._stages, self._controls = stages, controls
        self._loop = asyncio.get_running_loop()
        self._told: list[Told] = []
        self._task: asyncio.Task[None] | None = None
        self.error: MacpipeError | None = None

    def tell(self, told: Told) -> None:
        """Call ``told`` with what is found; at once, where that has been already."""
        self._told.append(told)
        if self.error:
            told(self.error)

    def begin(self, cause: MacpipeError) -> None:
        """The ring is lost."""
        self._loop.call_soon_threadsafe(self._begin, cause)

    async def ended(self) -> None:
        """Return once everybody has been told; at once where nothing broke."""
        if self._task:
            await self._task

    def _begin(self, cause: MacpipeError) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._hold(cause))

    async def _hold(self, cause: MacpipeError) -> None:
        error = cause
        try:
            error = await diagnose(cause, self._stages, self._controls)
        finally:  # whatever the looking does, requests wait for this
            log.info("%s (seen as: %s)", error.sentence, cause.sentence)
            self.error = error
            for told in self._told:
                told(error)


async def diagnose(
    cause: MacpipeError, stages: Sequence[PlannedStage], controls: Sequence[WorkerControl]
) -> MacpipeError:
    """The loss, with the workers named that no longer hold their stage; ``cause`` itself where all of them do."""
    found: dict[str, str] = {}
    async with anyio.create_task_group() as tasks:
        for stage, control in zip(stages, controls, strict=True):
            tasks.start_soon(_examine, stage, control, found)
    guilty = [s.worker for s in stages if s.worker in found]
    if not guilty:
        return cause
    return WorkerLost("; ".join(found[name] for name in guilty), worker=guilty[0])


async def _examine(stage: PlannedStage, control: WorkerControl, found: dict[str, str]) -> None:
    """Note what is wrong with a worker, if anything is."""
    try:
        facts, problem = await control.describe(DESCRIBE_TIMEOUT_S)
    except MacpipeError as e:
        found[stage.worker] = e.sentence
        return
    if problem:
        found[stage.worker] = f"worker {stage.worker}: {problem}"
    elif not facts.epoch:
        found[stage.worker] = f"worker {stage.worker} lost layers {stage.layers}: its engine was restarted"
    elif facts.epoch != stage.spec.epoch:
        found[stage.worker] = f"worker {stage.worker} was taken over: another coordinator loaded {facts.model} there"
