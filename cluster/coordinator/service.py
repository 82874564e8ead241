"""One model being served, from its load until it is unloaded, through as many epochs as that takes.

Its one task waits for trouble (a ring that broke, a worker that fell silent) and for workers that want to leave, and
answers each with a new epoch, in which every live request goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import anyio

from cluster.coordinator.canary import run_canary
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.epoch import Epoch, EpochBuilder, farewell
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.planner import capacity
from cluster.coordinator.recovery import Recovery, RecoveryContext, ServiceDeps, Troubles
from cluster.coordinator.replan import Assignment, restore_plan
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.slice_loading import Progress
from cluster.coordinator.step_times import StepTimes
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import Aborted, DeadlineExceeded, MacpipeError, NoPlan, NotServing, NoWorkers, WorkerLost
from cluster.core.limits import (
    CONTROL_TIMEOUT_S,
    DRAIN_RETRY_S,
    HEARTBEAT_S,
    LEARN_S,
    MOVE_S,
    RECOVERY_PAUSE_S,
    STEADY_S,
)
from cluster.core.plan import Plan
from cluster.core.worker import WorkerInfo
from cluster.membership.suspicion import Belief, Standing
from cluster.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

Said = Callable[[str], None]


class ModelService:
    """``said`` is told a sentence whenever something happens that a person should know.

    ``recovery`` is what is being done about a loss; None while the model is served. ``move`` is one that was planned,
    for a worker that leaves or comes home, during which requests go on.
    """

    def __init__(
        self, means: ServiceDeps, checkpoint: ModelInfo, order: LoadOrder, first: Assignment, said: Said
    ) -> None:
        self._means, self._said, self._first = means, said, first
        self.checkpoint = checkpoint
        self._events = asyncio.get_running_loop()
        self._troubles: Troubles = asyncio.Queue()  # bounded by one for each ring and each change of belief
        self._tasks: list[asyncio.Task[None]] = []
        self._refused_leave: dict[str, float] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._no_return_before = 0.0
        self._touched: set[str] = set()
        limits = capacity(first.plan, checkpoint.shape, order.max_step_ms)
        scheduler = Scheduler(first.plan.epoch, limits, checkpoint.tokenizer.eos)
        tokenizer = checkpoint.tokenizer
        pace = StepTimes(checkpoint.shape, first.plan.stages, [w.profile for w in first.workers])
        self.loop = EngineLoop(
            first.plan,
            scheduler,
            tokenizer.decoder,
            self._broken,
            pace=pace,
            parser=tokenizer.parser,
            lag=means.watch.lag,
        )
        self._order = order
        self._epoch: Epoch | None = None
        self.recovery: Recovery | None = None
        self.move: Recovery | None = None
        self.recoveries = 0

    @property
    def plan(self) -> Plan:
        return self._epoch.plan if self._epoch else self._first.plan

    @property
    def epoch(self) -> Epoch | None:
        return self._epoch

    async def open(self, progress: Progress) -> None:
        """Load, link, and send one token through every stage. Raises ``MacpipeError``; then nothing is held."""
        opening = EpochBuilder(
            self._means.dialer,
            self._means.supply,
            self.checkpoint,
            self._control,
            progress,
            self.loop.on_message,
            self.loop.on_stream_lost,
        )
        self._site = RecoveryContext(self._means, self.checkpoint, self._order, opening, self.loop, self._troubles)
        plan, workers = self._first.plan, self._first.workers
        try:
            await opening.load(plan, workers)
            self._epoch = await opening.link(plan, workers)
            self.loop.start(await opening.connect(self._epoch))
            await run_canary(self.loop, plan, self.checkpoint, self._troubles, self._means.watch)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close(NotServing("the load failed"))
            raise
        self._tasks = [asyncio.create_task(self._keep()), asyncio.create_task(self._teach_now_and_then())]

    async def close(self, error: MacpipeError) -> None:
        """End live requests with ``error`` and free the workers' memory, as far as they answer in time."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name in tuple(self._leaving):
            self._end_leave(name, error)
        await anyio.to_thread.run_sync(self.loop.stop, error)
        await farewell(self._means.epochs.last, [self._means.roster.control(a) for a in self._touched])

    def _control(self, address: str) -> WorkerClient:
        self._touched.add(address)
        return self._means.roster.control(address)

    # What can go wrong

    def _broken(self, cause: MacpipeError) -> None:
        """The loop's thread has lost its ring."""
        self._events.call_soon_threadsafe(self._troubles.put_nowait, cause)

    def on_belief(self, belief: Belief) -> None:
        """A worker's standing has changed."""
        if belief.worker in self._holders() and belief.standing is Standing.GONE:
            cause = WorkerLost(f"worker {belief.worker}: {belief.why}", worker=belief.worker)
            self.loop.suspect(cause)

    def alive(self) -> set[str]:
        """Workers through whom a frame went a moment ago."""
        lately = time.monotonic() - self.loop.patience.alive_at < HEARTBEAT_S and self.recovery is None
        return self._holders() if lately else set()

    async def teach(self) -> None:
        """Tell every worker what its frames took over what its profile predicts, where enough have been seen."""
        epoch = self._epoch
        if epoch is None or self.recovery:
            return
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            view = await asyncio.wrap_future(self.loop.view())
            async with anyio.create_task_group() as tasks:
                for pace, control in zip(view.pace, epoch.controls, strict=False):
                    if pace.ratio:
                        tasks.start_soon(_learn, control, epoch.plan.model.fingerprint, pace.ratio)

    async def _teach_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(LEARN_S)
            await self.teach()

    async def _keep(self) -> None:
        while True:
            try:
                await self._keep_once()
            except Exception as e:  # this task's edge: requests wait for it, so it must not end before the service
                log.exception("service: a recovery or a move failed epoch=%d", self.plan.epoch)
                self._troubles.put_nowait(MacpipeError(f"the coordinator failed: {type(e).__name__}: {e}"))
                await asyncio.sleep(RECOVERY_PAUSE_S)

    async def _keep_once(self) -> None:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                cause = await self._troubles.get()
        except TimeoutError:
            await self._let_leave()
            await self._let_return()
        else:
            await self._recover(cause)

    async def _recover(self, cause: MacpipeError) -> None:
        assert self._epoch
        self.recovery = recovery = Recovery(self._site, self._epoch, cause)
        self._said(f"{cause.sentence}; recovering")
        self._epoch = await recovery.run()
        self.recovery = None
        self._end_leaves_after_loss()
        self.recoveries += 1
        self._tell("serving again", recovery)

    def _tell(self, what: str, recovery: Recovery) -> None:
        took = time.monotonic() - recovery.began
        held = ", ".join(f"{s.worker} {s.layers}" for s in self.plan.stages)
        self._said(f"{what} after {took:.1f} s ({recovery.cause.sentence}): {held}")

    async def _carry_out(self, move: Recovery, chosen: Assignment | None = None) -> None:
        """Move layers while requests go on; what goes wrong after the switch is a loss like any other.

        Raises what went wrong before it: then the old ring still runs.
        """
        self.move = move
        try:
            self._epoch = await move.move(chosen)
        except MacpipeError as e:
            if not move.switched:
                raise
            self.move = None
            await self._recover(e)
        else:
            self._tell("layers moved", move)
        finally:
            self.move = None

    # Workers that want to leave

    async def move_away(self, name: str) -> None:
        """Return once a drained worker holds nothing.

        Raises ``NoPlan`` where its layers cannot go elsewhere, ``Aborted`` where the drain is undone, ``WorkerLost``
        where the worker crashes meanwhile and keeps its layers, ``DeadlineExceeded`` after ``MOVE_S``.
        """
        if name not in self._holders():
            return
        if (leaving := self._leaving.get(name)) is None:
            leaving = self._leaving[name] = self._events.create_future()
            leaving.add_done_callback(lambda done: done.cancelled() or done.exception())  # its client may have gone
        try:
            async with asyncio.timeout(MOVE_S):
                await asyncio.shield(leaving)
        except TimeoutError:
            raise DeadlineExceeded(f"the layers of {name} were not loaded elsewhere within {MOVE_S:.0f} s") from None

    def stays(self, name: str) -> None:
        """A worker that was drained is used again: nobody waits for its layers to move any more."""
        self._end_leave(name, Aborted(f"the drain of {name} was undone"))

    def _end_leaves_after_loss(self) -> None:
        """A recovery gave the layers out anew: a worker that was to leave has none now, or was started again."""
        for name in tuple(self._leaving):
            why = f"worker {name} was lost while it was drained, and is back with its layers; drain it again"
            self._end_leave(name, WorkerLost(why, worker=name) if name in self._holders() else None)

    def _end_leave(self, name: str, error: MacpipeError | None = None) -> None:
        leaving = self._leaving.pop(name, None)
        if leaving is None or leaving.done():
            return
        if error:
            leaving.set_exception(error)
        else:
            leaving.set_result(None)

    def _holders(self) -> set[str]:
        return {s.worker for s in self.plan.stages}

    async def _let_leave(self) -> None:
        """Move the layers of a worker that wants to hold nothing."""
        for member in self._means.watch.members():
            name, facts = member.facts.name, member.facts
            if facts.draining and not member.problem and name in self._holders() and self._may_leave(name):
                await self._move_from(facts)
                return

    def _may_leave(self, name: str) -> bool:
        return time.monotonic() - self._refused_leave.get(name, -DRAIN_RETRY_S) >= DRAIN_RETRY_S

    async def _move_from(self, leaver: WorkerInfo) -> None:
        assert self._epoch
        name = leaver.name
        cause = WorkerLost(f"worker {name} is being drained", worker=name)
        without = {name}
        while True:
            try:
                await self._carry_out(Recovery(self._site, self._epoch, cause, without))
                break
            except MacpipeError as e:
                worker = e.details.get("worker", "")
                if isinstance(e, NoPlan | NoWorkers) or not worker or worker in without:
                    await self._cannot_leave(leaver, e)
                    return
                log.warning("move: failed, trying without worker=%s reason=%s", worker, e.sentence)
                without.add(worker)
        if name not in self._holders():
            await self._release(leaver)

    async def _cannot_leave(self, leaver: WorkerInfo, why: MacpipeError) -> None:
        """Nobody else can hold its layers. One that stops in any case goes once nobody waits for an answer."""
        name = leaver.name
        self._refused_leave[name] = time.monotonic()
        self._said(f"worker {name} wants to leave, but its layers cannot go elsewhere: {why.sentence}")
        self._end_leave(name, why)
        if leaver.stopping and await self._is_idle():
            await self._release(leaver)

    async def _is_idle(self) -> bool:
        """Whether no request is under way, as far as the loop says so in time."""
        with anyio.move_on_after(CONTROL_TIMEOUT_S):
            return not (await asyncio.wrap_future(self.loop.view())).requests
        return False

    async def _let_return(self) -> None:
        """Where that is wished, give those who were lost their layers back, once they have been there for a while."""
        if not self._order.take_back or time.monotonic() < self._no_return_before:
            return
        since, watch = time.monotonic() - STEADY_S, self._means.watch
        steady = (m.facts for m in watch.members() if not m.problem and watch.up_since(m.facts.name, since))
        number = self._means.epochs.next
        back = WorkerLost("workers that were lost take their layers back")
        try:
            home = restore_plan(number, self._first, self.plan, self.checkpoint.shape, self._order, steady)
            if home and self._epoch:
                await self._carry_out(Recovery(self._site, self._epoch, back), home)
        except MacpipeError as e:
            self._no_return_before = time.monotonic() + DRAIN_RETRY_S
            self._said(f"workers that were lost cannot take their layers back: {e.sentence}")

    async def _release(self, leaver: WorkerInfo) -> None:
        await farewell(self._means.epochs.last, [self._control(leaver.control_address)])
        self._end_leave(leaver.name)


async def _learn(control: WorkerClient, fingerprint: str, ratio: float) -> None:
    try:
        await control.learn(fingerprint, ratio)
    except MacpipeError as e:
        log.info("a ratio was not learned: %s", e.sentence)
