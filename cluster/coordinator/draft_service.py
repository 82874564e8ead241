"""Serve a draft model for another model: load it on its spare worker, and connect it as a ring of one.

The ring's frames come from the engine loop's thread, on which their replies are handled too. While the ring is lost,
the target goes on without drafts, and the draft model is loaded again on a worker that holds no layers of the target.
Layers go first: a recovery or a planned move may take the draft's worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Final

import anyio

from cluster.coordinator.draft_assignment import DraftAssignment, assign_draft
from cluster.coordinator.epoch import ControlOf, EpochBuilder, unload_workers
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.ring import Ring
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.stage_setup import Progress
from cluster.core.errors import MacpipeError, StaleEpoch
from cluster.core.frames import Frame
from cluster.core.limits import FRAME_FLOOR_S, PREFILL_CHUNK
from cluster.core.worker import WorkerInfo
from cluster.scheduler.draft_guesser import DraftGuesser, DraftModel
from cluster.wire.frame_codec import decode, encode

log = logging.getLogger(__name__)

DRAFT_RETRY_S: Final = 2.0
"""First interval of checks whether a lost draft model can be loaded again."""
MOST_DRAFT_SEARCH_S: Final = 16.0
"""The same after several checks that found no Mac for it: each doubles it."""
MOST_DRAFT_RETRY_S: Final = 60.0
"""The same after several loads that brought no guess: each doubles it."""
DRAFT_OVERDUE_S: Final = 4 * FRAME_FLOOR_S
"""A draft's engine hangs if it has answered no frame for so long. Nobody waits for it, so it may read long prompts."""
OnLoop = Callable[[Callable[[], bool]], None]
"""Runs a job on the engine loop's thread, which then sends guesses if the job returns True."""


class DraftService:
    """The draft model of ``target``. ``notify`` is called with a sentence about each event for people.

    ``problem`` says why it does not guess; "" while it does.
    """

    def __init__(
        self,
        target: ModelInfo,
        assignment: DraftAssignment,
        deps: ServiceDeps,
        control: ControlOf,
        notify: Callable[[str], None],
    ) -> None:
        self._target, self._assignment, self._deps, self._control = target, assignment, deps, control
        self._notify = notify
        self._name = assignment.model_info.shape.model.name
        self._holder: WorkerInfo | None = None
        """The worker that holds the model, or did when it was last asked to."""
        self._task: asyncio.Task[None] | None = None
        self._loading_on = ""
        self._retry_s = self._search_s = DRAFT_RETRY_S
        self._not_before = 0.0
        self._told = False
        self._rings: list[Ring] = []
        """The rings that may be open: at most the last two."""
        self.problem = f"the draft model {self._name} is not loaded yet"
        # The engine loop's thread alone uses what follows.
        self._ring: Ring | None = None
        self._epoch = self._lost_epoch = 0
        self._unanswered, self._alive_at = 0, 0.0
        self.guesser = DraftGuesser(_model_of(assignment), self._send)

    @property
    def worker(self) -> str:
        """The name of the worker that holds the model; "" if it is lost."""
        return self._holder.name if self._holder and not self.problem else ""

    async def open(self, progress: Progress, on_loop: OnLoop) -> None:
        """Load the model and connect it. Raises ``MacpipeError``."""
        self._on_loop = on_loop
        await self._load(self._assignment, lambda each: progress(replace(each, draft=self._name)))

    def tend(self, busy: Collection[str]) -> None:
        """Begin to load the model again if it is lost, if its worker drains, or if its engine hangs. Returns at once.

        ``busy`` are the workers that hold layers of the target.
        """
        if self._task and not self._task.done():
            if self._loading_on and self._deps.heartbeat.is_gone(self._loading_on):
                self._task.cancel()
            return
        if self.worker and (why := self._why_leave(self.worker, busy)):
            self.lose(why)
        elif self._holder and self.worker and (silent_s := self._silence()) > DRAFT_OVERDUE_S:
            why = f"the engine of worker {self.worker} has answered no frame for {silent_s:.0f} s"
            self.lose(why)
            self._task = asyncio.create_task(self._reset(self._holder, why))
            return
        if not self.problem:
            return
        if not self._told:
            self._notify(self.problem)
            self._told = True
        if time.monotonic() >= self._not_before:
            self._task = asyncio.create_task(self._open_again(busy))

    def stop_loading(self) -> None:
        """Stop loading the model, since layers of the target are about to be placed anew.

        A worker that gets both obeys the later order, which has the larger epoch.
        """
        if self._task:
            self._task.cancel()

    def lose(self, why: str) -> None:
        """Let the model guess no more."""
        epoch = self._assignment.plan.epoch
        self._on_loop(lambda: self._fail(epoch, why))

    async def leave(self, worker: str) -> None:
        """Free the worker, which is being drained, if it holds the model."""
        if self._holder and self._holder.name == worker:
            self.stop_loading()
            self.lose(f"worker {worker} is being drained")
            await self._free(self._holder)

    async def close(self) -> None:
        """Close the ring. Called once the engine loop has stopped."""
        if self._task:
            self._task.cancel()
            await asyncio.wait((self._task,))
        for ring in self._rings:
            await anyio.to_thread.run_sync(ring.close)
        self._assignment.model_info.release()

    # On the event loop

    async def _load(self, assignment: DraftAssignment, progress: Progress) -> None:
        plan, workers = assignment.plan, (assignment.worker,)

        def received(message: bytes) -> None:
            self._on_loop(lambda: self._receive(plan.epoch, message))

        def lost(epoch: int, worker: str, why: str) -> None:
            self._on_loop(lambda: self._fail(epoch, f"{worker}: {why}"))

        builder = EpochBuilder(
            self._deps.dialer,
            self._deps.weights,
            assignment.model_info,
            self._control,
            progress,
            received,
            lost,
            self._deps.roster.take_term,
            self._deps.roster.claim,
        )
        self._deps.roster.pin_draft(assignment.worker)
        self._assignment, self._holder = assignment, assignment.worker
        await builder.load(plan, workers)
        ring = await builder.connect(await builder.link(plan, workers))
        self._rings = [*self._rings[-1:], ring]
        self._on_loop(lambda: self._begin(assignment, ring))

    async def _open_again(self, busy: Collection[str]) -> None:
        self._not_before = time.monotonic() + self._search_s
        self._search_s = min(2 * self._search_s, MOST_DRAFT_SEARCH_S)
        try:
            members = self._deps.members()
            try:
                assignment = self._assign(members, busy)
            except MacpipeError:
                await self._free_unless(busy, members)
                raise
            if self._holder and self._holder.name != assignment.worker.name:
                await self._free_unless(busy, members)
            self._loading_on = assignment.worker.name
            self._search_s = DRAFT_RETRY_S
            self._not_before = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, MOST_DRAFT_RETRY_S)
            await self._load(assignment, lambda progress: None)
        except MacpipeError as e:
            if isinstance(e, StaleEpoch):
                self._deps.epochs.learn_refusal(e)
            problem = f"the draft model {self._name} does not guess: {e.sentence}"
            if problem != self.problem:
                log.info("draft: cannot reload draft model reason=%s model=%s", e.sentence, self._name)
            self.problem = problem
        except Exception as e:  # top of the task
            log.exception("draft: not loaded again")
            self.problem = f"the draft model {self._name} does not guess: {type(e).__name__}: {e}"
        else:
            self._told = False
            self._notify(f"the draft model {self._name} guesses again on worker {assignment.worker.name}")
        finally:
            self._loading_on = ""

    def _assign(self, members: Collection[RosterEntry], busy: Collection[str]) -> DraftAssignment:
        usable = [m.info for m in members if not m.problem and not m.info.draining]
        epoch = self._deps.epochs.next(m.info.epoch for m in members)
        return assign_draft(epoch, self._target, self._assignment.model_info, usable, busy)

    def _why_leave(self, worker: str, busy: Collection[str]) -> str:
        if worker in busy:
            return f"worker {worker} took layers of the model"
        entry = self._entry(worker, self._deps.members())
        return f"worker {worker} is being drained" if entry and entry.info.draining else ""

    def _entry(self, worker: str, members: Collection[RosterEntry]) -> RosterEntry | None:
        return next((m for m in members if m.info.name == worker), None)

    def _silence(self) -> float:
        """Return for how many seconds a frame has waited for any answer; 0 if none waits."""
        return time.monotonic() - self._alive_at if self._unanswered else 0.0

    async def _reset(self, holder: WorkerInfo, why: str) -> None:
        try:
            await self._control(holder.control_address).reset(why, epoch=self._assignment.plan.epoch)
        except MacpipeError as e:
            log.info("draft: engine not reset reason=%s worker=%s", e.sentence, holder.name)

    async def _free_unless(self, busy: Collection[str], members: Collection[RosterEntry]) -> None:
        """Free the worker that held the model, unless it is busy or does not answer."""
        if self._holder and self._holder.name not in busy:
            entry = self._entry(self._holder.name, members)
            if entry and not entry.problem:
                await self._free(self._holder)

    async def _free(self, holder: WorkerInfo) -> None:
        self._holder = None
        self._deps.roster.pin_draft(None)
        await unload_workers(self._deps.roster, self._assignment.plan.epoch, [holder.control_address])

    # On the engine loop's thread

    def _begin(self, assignment: DraftAssignment, ring: Ring) -> bool:
        epoch = assignment.plan.epoch
        if self._lost_epoch == epoch:
            ring.close()
            return False
        self._ring, self._epoch, self._unanswered = ring, epoch, 0
        self.problem = ""
        self.guesser.open(_model_of(assignment))
        return False

    def _send(self, frame: Frame) -> None:
        if self._ring:
            self._alive_at = self._alive_at if self._unanswered else time.monotonic()
            self._unanswered += 1
            self._ring.send(encode(frame))

    def _receive(self, epoch: int, message: bytes) -> bool:
        if epoch != self._epoch or self._ring is None:
            return False
        self._unanswered, self._alive_at = self._unanswered - 1, time.monotonic()
        try:
            guessed = self.guesser.receive(decode(message))
        except MacpipeError as e:
            return self._fail(epoch, e.sentence)
        if guessed:
            self._retry_s = DRAFT_RETRY_S
        return guessed

    def _fail(self, epoch: int, why: str) -> bool:
        self._lost_epoch = max(self._lost_epoch, epoch)
        if epoch == self._epoch and self._ring:
            log.warning("draft: lost reason=%s epoch=%d", why, epoch)
            self.problem = f"the draft model {self._name} does not guess: {why}"
            self.guesser.close()
            self._ring.close()
            self._ring = None
        return False


def _model_of(assignment: DraftAssignment) -> DraftModel:
    plan, shape = assignment.plan, assignment.model_info.shape
    return DraftModel(
        plan.epoch,
        shape.vocabulary,
        assignment.target_vocabulary,
        shape.max_context,
        plan.max_sequences * shape.max_context,
        PREFILL_CHUNK,
    )
