"""Serve one model from load to unload, through any number of epochs.

One task waits for failures (a broken ring, a silent worker) and for draining workers. It handles each with a new epoch,
in which every live request continues where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import anyio

from cluster.coordinator.adapter_changes import RingAdapters
from cluster.coordinator.answer_queue import AnswerQueue, EndRequest
from cluster.coordinator.canary import run_canary
from cluster.coordinator.draft_assignment import DraftAssignment
from cluster.coordinator.draft_service import DraftService
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.epoch import Epoch, EpochBuilder, unload_workers
from cluster.coordinator.link_upkeep import LinkUpkeep
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.planned_move import PlannedMove
from cluster.coordinator.planner import capacity
from cluster.coordinator.prefix_disks import PrefixDisks
from cluster.coordinator.recovery import EpochChange, Failures, Recovery, RecoveryContext, ServiceDeps
from cluster.coordinator.replan import Assignment, restore_plan
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.stage_setup import Progress
from cluster.coordinator.step_times import StageStepTime, StepTimes
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.cluster_state import EventKind, holders_in_words
from cluster.core.errors import (
    Aborted,
    DeadlineExceeded,
    MacpipeError,
    NoPlan,
    NotServing,
    NoWorkers,
    WorkerLost,
)
from cluster.core.futures import ignore_error
from cluster.core.limits import (
    CONTROL_TIMEOUT_S,
    DRAIN_RETRY_S,
    HEARTBEAT_S,
    LEARN_S,
    MOVE_S,
    RECOVERY_PAUSE_S,
    STEADY_S,
)
from cluster.core.plan import Plan, Speculation
from cluster.core.request import Request
from cluster.core.worker import WorkerInfo
from cluster.membership.suspicion import Belief, Standing
from cluster.scheduler.disk_prefixes import DiskRead
from cluster.scheduler.guessing import FirstGuesser, Guesser
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.text_guesser import TextGuesser

log = logging.getLogger(__name__)

Notify = Callable[[str], None]


class ModelService:
    """A model that is loaded and served. ``notify`` is called with a sentence about each event for people.

    ``changed`` is called when a recovery begins, and when it has ended. ``retire`` is called once a worker stops, or
    is lost, whose layers fit nowhere else. It returns whether the service is closed for that: another one goes on.
    ``recovery`` is the recovery that is running after a loss; None while the model is served. ``move`` is a planned
    move, for a worker that drains or comes back; requests continue during a move.
    """

    def __init__(
        self,
        deps: ServiceDeps,
        model_info: ModelInfo,
        order: LoadOrder,
        first: Assignment,
        notify: Notify,
        draft: DraftAssignment | None = None,
        changed: Callable[[], None] = lambda: None,
        retire: Callable[[], bool] = lambda: False,
    ) -> None:
        self._deps, self._tell, self._first = deps, notify, first
        self._changed, self._retire = changed, retire
        self.model_info = model_info
        self._events = asyncio.get_running_loop()
        self._failures: Failures = asyncio.Queue()  # bounded: at most one per ring and one per change of belief
        self._tasks: list[asyncio.Task[None]] = []
        self._move_refused_at: dict[str, float] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._no_restore_before = 0.0
        self._links = LinkUpkeep(self._steady_epoch, self._is_idle, deps.members)
        self._contacted: set[str] = set()  # control addresses
        limits = capacity(first.plan, model_info.shape, order, first.workers)
        self._draft = DraftService(model_info, draft, deps, self._control, self._notify) if draft else None
        scheduler = Scheduler(first.plan.epoch, limits, model_info.tokenizer.eos, self._guesser(order.speculation))
        tokenizer = model_info.tokenizer
        step_times = StepTimes.of(model_info.shape, first.plan, first.workers)
        self.loop = EngineLoop(
            first.plan,
            scheduler,
            tokenizer.decoder,
            self._queue_loss,
            step_times=step_times,
            lag=deps.heartbeat.lag,
            read_prefix=self._read_prefix,
        )
        self._disks = PrefixDisks(deps.prefix_owners)
        self._order = order
        self._epoch: Epoch | None = None
        self._sent_step_times: tuple[StageStepTime, ...] = ()
        self.recovery: Recovery | None = None
        self.move: PlannedMove | None = None

    def _notify(self, sentence: str) -> None:
        self._tell(self._deps.name_model(sentence))

    @property
    def plan(self) -> Plan:
        return self._epoch.plan if self._epoch else self._first.plan

    def _guesser(self, speculation: Speculation) -> Guesser | None:
        draft = [self._draft.guesser] if self._draft else []
        if speculation is Speculation.OFF:
            return None
        texts = [] if speculation is Speculation.DRAFT else [TextGuesser(time.monotonic)]
        return FirstGuesser([*texts, *draft])

    @property
    def disk_problem(self) -> str:
        """Why the workers' disks are not used for prefixes; "" if they are, or if there are none."""
        return self._disks.problem

    @property
    def draft_problem(self) -> str:
        """Why there are no drafts although there is a draft model; "" if there are, or if there is none."""
        return self._draft.problem if self._draft else ""

    @property
    def draft_worker(self) -> str:
        """The worker that holds the draft model; "" if there is none, or if it is lost."""
        return self._draft.worker if self._draft else ""

    @property
    def speculation(self) -> Speculation:
        """What guesses tokens before they are sampled."""
        return self._order.speculation

    def create_answer(self, request: Request) -> AnswerQueue:
        """Create an answer queue that ends its request if the client stops reading.

        Raises ``ModelNotFound`` if the request's adapter is not served.
        """
        self.model_info.adapters.require(request.adapter)
        return AnswerQueue(self.loop.post, self._abandon(request), request.samples)

    def adopt_answer(self, request: Request, answer: AnswerQueue) -> None:
        """Let the answer of a request that moves here be written by this service's loop."""
        answer.move(self.loop.post, self._abandon(request))

    def _abandon(self, request: Request) -> EndRequest:
        return lambda answer: self.loop.abandon(request.id, answer)

    @property
    def epoch(self) -> Epoch | None:
        return self._epoch

    async def open(self, progress: Progress) -> None:
        """Load and link the stages, and send one token through all of them.

        Raises ``MacpipeError``; the workers' memory is then freed.
        """
        builder = EpochBuilder(
            self._deps.dialer,
            self._deps.weights,
            self.model_info,
            self._control,
            progress,
            self.loop.on_message,
            self.loop.on_stream_lost,
            self._deps.roster.take_term,
            self._deps.roster.claim,
            insecure_links=self._order.insecure_links,
        )
        self._context = RecoveryContext(
            self._deps,
            self.model_info,
            self._order,
            builder,
            self.loop,
            self._failures,
            self._disks,
            lambda: self.draft_worker,
        )
        self.adapters = RingAdapters(self.model_info, self.loop, builder, self._steady_epoch)
        plan, workers = self._first.plan, self._first.workers
        try:
            await builder.load(plan, workers)
            self._epoch = await builder.link(plan, workers)
            disk = await self._disks.open(self._epoch, builder.edition)
            self.loop.start(await builder.connect(self._epoch), disk)
            await run_canary(self.loop, plan, self.model_info, self._failures, self._deps.heartbeat)
            if self._draft:
                await self._draft.open(progress, self.loop.advance_guesses)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close(NotServing("the load failed"))
            raise
        self._tasks = [
            asyncio.create_task(self._supervise()),
            asyncio.create_task(self._keep_sending_step_times()),
            asyncio.create_task(self._links.run()),
        ]

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error``, and free the memory of those workers that answer in time."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name in tuple(self._leaving):
            self._end_leave(name, error)
        await anyio.to_thread.run_sync(self.loop.stop, error)
        if self._draft:
            await self._draft.close()
        await unload_workers(self._deps.roster, self._deps.epochs.last, self._contacted)

    def _steady_epoch(self) -> Epoch | None:
        """Return the epoch that serves; None during a recovery or a move."""
        return None if self.recovery or self.move else self._epoch

    def _control(self, address: str) -> WorkerClient:
        self._contacted.add(address)
        return self._deps.roster.control(address)

    # Prefixes on disk

    def _read_prefix(self, order: DiskRead) -> None:
        """Have the stages read a prefix. Called on the loop's thread."""
        asyncio.run_coroutine_threadsafe(self._read_from_disks(order), self._events)

    async def _read_from_disks(self, order: DiskRead) -> None:
        self.loop.on_prefix_read(order, *await self._disks.read(order))

    # Failures

    def _queue_loss(self, cause: MacpipeError) -> None:
        """Queue the loss of the ring. Called on the loop's thread."""
        self._events.call_soon_threadsafe(self._failures.put_nowait, cause)

    def on_belief(self, belief: Belief) -> None:
        """Handle a changed belief: if a worker that holds a stage is gone, treat the ring as lost."""
        if self.recovery:
            self.recovery.notice_change()
        if belief.standing is Standing.GONE:  # of the loop's ring, which is not that of ``plan`` as an epoch changes
            self.loop.suspect(WorkerLost(f"worker {belief.worker}: {belief.why}", worker=belief.worker))
        if self._draft and belief.worker == self._draft.worker and belief.standing is Standing.GONE:
            self._draft.lose(f"worker {belief.worker}: {belief.why}")

    def alive(self) -> set[str]:
        """Return the workers that a frame passed within the last ``HEARTBEAT_S``."""
        recent = time.monotonic() - self.loop.deadlines.alive_at < HEARTBEAT_S and self.recovery is None
        return self._stage_workers() if recent else set()

    async def send_step_times(self) -> None:
        """Send each worker its ratio of measured to predicted step time, if enough frames were measured.

        A ratio is sent once: each time that a worker hears of it, its correction moves.
        """
        epoch = self._epoch
        if epoch is None or self.recovery:
            return
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            view = await asyncio.wrap_future(self.loop.view())
            if view.step_times == self._sent_step_times:
                return  # no frame was decoded since
            self._sent_step_times = view.step_times
            async with anyio.create_task_group() as tasks:
                pairs = zip(epoch.plan.stages, epoch.controls, strict=True)
                controls = [(one.spec.ranks, control) for one, control in pairs if one.spec.rank == 0]
                for stage, (ranks, control) in zip(view.step_times, controls, strict=False):
                    if stage.ratio and ranks == 1:  # a group's time says nothing of one Mac's speed
                        tasks.start_soon(_send_step_time, control, epoch.plan.model.fingerprint, stage.ratio)

    async def _keep_sending_step_times(self) -> None:
        while True:
            await asyncio.sleep(LEARN_S)
            await self.send_step_times()
            await self._disks.follow_owners()

    async def _supervise(self) -> None:
        while True:
            try:
                await self._handle_next()
            except Exception as e:  # top of the task: requests wait for it, so it must outlive errors
                log.exception(
                    "service: recovery or move failed epoch=%d model=%s", self.plan.epoch, self.model_info.shape.title
                )
                self._failures.put_nowait(MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))
                await asyncio.sleep(RECOVERY_PAUSE_S)

    async def _handle_next(self) -> None:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                cause = await self._failures.get()
        except TimeoutError:
            await self._move_draining()
            await self._restore_layers()
            await self._use_better_link()
            if self._draft:
                self._draft.tend(self._stage_workers())
        else:
            await self._recover(cause)

    async def _recover(self, cause: MacpipeError) -> None:
        assert self._epoch
        if self._draft:
            self._draft.stop_loading()
        self.recovery = recovery = Recovery(self._context, self._epoch, cause, self._notify, self._retire)
        self._changed()
        self._epoch = await recovery.run()
        self.recovery = None
        self._changed()
        self._end_leaves_after_loss()
        self._notify_done(EventKind.RECOVERY, recovery)

    def _notify_done(self, kind: EventKind, change: EpochChange) -> None:
        what = "serving again" if kind is EventKind.RECOVERY else "layers moved"
        elapsed_s = time.monotonic() - change.began
        layers = holders_in_words(self.plan.stages)
        self._notify(f"{what} after {elapsed_s:.1f} s ({change.reason}): {layers}")
        sentence = self._deps.name_model(f"{change.reason}; {what}: {layers}")
        self._deps.timeline.add(kind, sentence, change.worker, change.began)

    async def _carry_out(self, move: PlannedMove, chosen: Assignment | None = None) -> None:
        """Move layers while requests continue.

        Raises an error that occurs before the switch to the new ring; the old ring then still runs. An error after the
        switch starts a recovery.
        """
        self.move = move
        if self._draft:
            self._draft.stop_loading()
        try:
            self._epoch = await move.run(chosen)
        except MacpipeError as e:
            if not move.switched:
                raise
            self.move = None
            await self._recover(e)
        else:
            self._notify_done(EventKind.MOVE, move)
        finally:
            self.move = None

    # Draining workers

    async def move_away(self, name: str) -> None:
        """Wait until a drained worker holds no layers, nor the draft model.

        Raises ``NoPlan`` if no other workers can hold its layers, ``Aborted`` if the drain is undone, ``WorkerLost`` if
        the worker crashes in the meantime and keeps its layers, and ``DeadlineExceeded`` after ``MOVE_S``.
        """
        if self._draft:
            await self._draft.leave(name)
        if name not in self._stage_workers():
            return
        if (leaving := self._leaving.get(name)) is None:
            leaving = self._leaving[name] = self._events.create_future()
            leaving.add_done_callback(ignore_error)  # nobody awaits it if the client has disconnected
        try:
            async with asyncio.timeout(MOVE_S):
                await asyncio.shield(leaving)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the layers of {name} were not moved to other workers within {MOVE_S:.0f} s; see `macpipe status`, and"
                " drain it again"
            ) from None

    def cancel_move_away(self, name: str) -> None:
        """End the wait of ``move_away`` for a worker whose drain was undone."""
        self._end_leave(name, Aborted(f"the drain of {name} was undone"))

    def _end_leaves_after_loss(self) -> None:
        """End all waits of ``move_away`` after a recovery.

        The recovery reassigned the layers. A draining worker has none now, unless it restarted, which ends its drain.
        """
        for name in tuple(self._leaving):
            why = f"worker {name} was lost during its drain and has its layers back; drain it again"
            self._end_leave(name, WorkerLost(why, worker=name) if name in self._stage_workers() else None)

    def _end_leave(self, name: str, error: MacpipeError | None = None) -> None:
        leaving = self._leaving.pop(name, None)
        if leaving is None or leaving.done():
            return
        if error:
            leaving.set_exception(error)
        else:
            leaving.set_result(None)

    def _stage_workers(self) -> set[str]:
        return {s.worker for s in self.plan.stages}

    async def _move_draining(self) -> None:
        """Move the layers of the first draining worker that holds a stage."""
        for member in self._deps.members():
            name, info = member.info.name, member.info
            if info.draining and not member.problem and name in self._stage_workers() and self._may_retry_move(name):
                await self._move_from(info)
                return

    def _may_retry_move(self, name: str) -> bool:
        return time.monotonic() - self._move_refused_at.get(name, -DRAIN_RETRY_S) >= DRAIN_RETRY_S

    async def _move_from(self, leaver: WorkerInfo) -> None:
        assert self._epoch
        name = leaver.name
        without = {name}
        while True:
            try:
                reason = f"worker {name} is being drained"
                await self._carry_out(PlannedMove(self._context, self._epoch, reason, name, without))
                break
            except MacpipeError as e:
                if isinstance(e, NoPlan | NoWorkers) and await self._deps.take_back():
                    continue
                worker = e.details.get("worker", "")
                if isinstance(e, NoPlan | NoWorkers) or not worker or worker in without:
                    await self._cannot_leave(leaver, e)
                    return
                log.warning("move: failed, trying without a worker reason=%s worker=%s", e.sentence, worker)
                without.add(worker)
        if name not in self._stage_workers():
            await self._release(leaver)

    async def _cannot_leave(self, leaver: WorkerInfo, why: MacpipeError) -> None:
        """Handle a drain that is impossible, since no other workers can hold the layers.

        A worker that is stopping anyway is released once no request is live.
        """
        name = leaver.name
        self._move_refused_at[name] = time.monotonic()
        self._notify(f"worker {name} cannot be drained, since no other workers can hold its layers: {why.sentence}")
        self._end_leave(name, why)
        if leaver.stopping and not self._retire() and await self._is_idle():
            await self._release(leaver)

    async def _is_idle(self) -> bool:
        """Return whether no request is live; False if the loop does not answer within ``CONTROL_TIMEOUT_S``."""
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            return not (await asyncio.wrap_future(self.loop.view())).requests
        return False

    async def _restore_layers(self) -> None:
        """Give lost workers their layers back once up for ``STEADY_S``, if the order has ``take_back``."""
        if not self._order.take_back or time.monotonic() < self._no_restore_before:
            return
        since = time.monotonic() - STEADY_S
        heartbeat = self._deps.heartbeat
        steady = (m.info for m in self._deps.members() if not m.problem and heartbeat.up_since(m.info.name, since))
        next_number = self._deps.epochs.next
        reason = "workers that were lost are back and take their layers again"
        try:
            assignment = restore_plan(
                next_number, self._first, self.plan, self.model_info.placed_shape, self._order, steady
            )
            if assignment and self._epoch:
                await self._carry_out(PlannedMove(self._context, self._epoch, reason), assignment)
        except MacpipeError as e:
            self._no_restore_before = time.monotonic() + DRAIN_RETRY_S
            self._notify(f"workers that are back cannot take their layers again: {e.sentence}")

    async def _use_better_link(self) -> None:
        """Link the stages again over a much better link, if one was found and no request is live."""
        epoch = self._epoch
        if epoch is None or not self._links.has_better(epoch) or not await self._is_idle():
            return
        reason = self._links.take()
        try:
            await self._carry_out(PlannedMove(self._context, epoch, reason))
        except MacpipeError as e:
            self._notify(f"{reason}, but the stages cannot be linked over it: {e.sentence}")

    async def _release(self, leaver: WorkerInfo) -> None:
        await unload_workers(self._deps.roster, self._deps.epochs.last, [leaver.control_address])
        self._end_leave(leaver.name)


async def _send_step_time(control: WorkerClient, fingerprint: str, ratio: float) -> None:
    try:
        await control.send_step_time_ratio(fingerprint, ratio)
    except MacpipeError as e:
        log.info("service: step-time ratio not sent reason=%s worker=%s", e.sentence, control.name)
