"""Load models when requests need them, make room for them, and unload those that nobody uses.

Requests for one model share its load. The load goes on when none of them waits any more: a client that gave up asks
again, and a load that was given up would only have evicted others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import anyio

from cluster.coordinator.copy_keeper import newest_first
from cluster.coordinator.deployment import Deployment
from cluster.coordinator.eviction import Resident, Room, find_room
from cluster.coordinator.model_catalog import DEFAULT
from cluster.coordinator.model_host import HeldModel, ModelHost
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.model_returns import ModelReturns
from cluster.coordinator.promised_contexts import PromisedContexts
from cluster.coordinator.replica import Replica
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.cluster_state import ServingState
from cluster.core.errors import DoesNotFit, MacpipeError, NotServing, NoWorkers, WorkerLost
from cluster.core.load_limits import (
    FAILED_RETRY_S,
    IDLE_CHECK_S,
    LOAD_TRIES,
    LOAD_WAIT_S,
    MAX_FAILED_RETRY_S,
    MIN_RESIDENT_S,
    REFUSED_RETRY_S,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a model was not loaded with this order, and for how long that is not tried again."""

    error: MacpipeError
    order: LoadOrder
    retry_s: float
    until: float


class OnDemand:
    """The models of one coordinator that are loaded when they are asked for.

    All methods must be called on the coordinator's event loop.
    """

    def __init__(
        self,
        host: ModelHost,
        load_wait_s: float = LOAD_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._host, self._clock, self._sleep = host, clock, sleep
        self.load_wait_s = load_wait_s
        """How long a request waits for its model if nothing can be sent meanwhile."""
        self._loads: dict[str, asyncio.Task[MacpipeError | None]] = {}
        """Those that run for requests: at most one for each model of the catalog."""
        self._failures: dict[str, _Failure] = {}
        self._pauses: dict[str, float] = {}
        """Until when a load waits for what was just loaded."""
        self._holds = Counter[str]()
        self._held_at: dict[str, float] = {}
        """When a request for each model was last about to be submitted."""
        self.contexts = PromisedContexts(host)
        """Of the models that are not loaded."""
        self._returns = ModelReturns(host, self._load_beside, clock, sleep)
        self._turn = asyncio.Lock()
        """Held while one model makes room for itself and is loaded."""
        self._reading = asyncio.Lock()
        """Held while a tokenizer is read, which is a process of its own, and used."""

    @property
    def enabled(self) -> bool:
        """Whether models come and go. A single model without a time limit is loaded and unloaded by people alone."""
        entries = self._host.deployments.catalog.entries
        return len(entries) > 1 or any(entry.idle_unload_s is not None for entry in entries)

    def is_ready(self, requested: str | None) -> bool:
        """Return whether a request for this model need not wait. Raises ``NotServing``, or ``ModelNotFound``."""
        if self.enabled or self._host.deployments.lead_change.is_returning:
            entry, _ = self._host.deployments.catalog.resolve(requested)
            return self._is_served(entry.name) and not self._is_replaced(entry)
        self._host.served_model(requested or "")
        return True

    def would_load(self, requested: str | None) -> bool:
        """Return whether a model is not loaded, and a request would load it now. Raises ``ModelNotFound``."""
        if not self.enabled:
            return False
        entry, _ = self._host.deployments.catalog.resolve(requested)
        return not self._is_served(entry.name) and self._recent_failure(entry) is None

    async def await_ready(self, requested: str | None, seconds: float) -> bool:
        """Begin to load this model if it is not loaded. Return whether a request need not wait, after so many seconds.

        If the load fails meanwhile, a request gets a fallback, which may have to be loaded as well, or the error.
        """
        if self.is_ready(requested):
            return True
        if not self.enabled:
            return await self._host.deployments.lead_change.wait_returned(seconds)
        deadline = self._clock() + seconds
        for entry in self._with_fallbacks(self._host.deployments.catalog.resolve(requested)[0]):
            try:
                if await self._refusal(entry, deadline) is None:
                    return True
            except NotServing:
                return False
        return True

    @asynccontextmanager
    async def hold(
        self, requested: str | None, adapter: str = "", wait_s: float | None = None
    ) -> AsyncIterator[HeldModel]:
        """Keep a model loaded within the block, and load it first if it is not; or a fallback, if it cannot be served.

        ``wait_s`` is how long to wait for the load; None: until it ends. Raises ``NotServing`` after that, the error of
        the load, as ``Coordinator.served_model``, and as ``LeadChange.until_end``.
        """
        change = self._host.deployments.lead_change
        async with change.until_end():
            if not self.enabled:
                await change.wait_returned(self.load_wait_s)
                yield HeldModel(self._host.served_model(requested or "", adapter))
                return
            name, is_fallback = await self._acquire(requested, wait_s)
            try:
                if is_fallback:
                    yield HeldModel(self._host.served_model(name), name)
                else:
                    yield HeldModel(self._host.served_model(requested or "", adapter))
            finally:
                self._release(name)

    @asynccontextmanager
    async def hold_tokenizer(self, requested: str | None) -> AsyncIterator[ModelInfo]:
        """Keep a model's tokenizer within the block. Its weights are not loaded for that, and nothing is evicted.

        Raises ``NotServing`` after ``load_wait_s`` behind others that do so, as ``ModelReader.read``, and as ``hold``.
        """
        if self.is_ready(requested):
            async with self.hold(requested) as held:
                yield held.model_info
            return
        entry, _ = self._host.deployments.catalog.resolve(requested)
        try:
            async with asyncio.timeout(self.load_wait_s):
                await self._reading.acquire()
        except TimeoutError:
            why = f"{entry.name} is not loaded, and others wait for its tokenizer; try again in a moment"
            raise NotServing(why, retry_after_s=FAILED_RETRY_S) from None
        try:
            async with self._host.deployments.lead_change.until_end():
                model_info = await self._host.deployments[entry.name].read(entry.order)
                try:
                    yield model_info
                finally:
                    with anyio.CancelScope(shield=True):
                        await model_info.close()
        finally:
            self._reading.release()

    async def load(self, order: LoadOrder, follower: LoadReporter | None = None, *, name: str = DEFAULT) -> None:
        """Load a model for an operator. Idle models leave for it, also those that were loaded a moment ago.

        Raises as ``find_room``, ``Coordinator.load`` and ``LoadTasks.run``.
        """
        deployments = self._host.deployments
        name = deployments.own_name(name)
        if not any(one.model_info and one.name != name for one in deployments.values()):
            await self._host.load(order, follower, name=name)
            return
        order.check()
        entry = replace(deployments.catalog.get(name) or ModelEntry(name, order), order=order)
        await self._host.loads.run(name, self._load_in_turn(entry, follower))

    async def _load_in_turn(self, entry: ModelEntry, follower: LoadReporter | None) -> None:
        async with self._turn:
            try:
                room = await self.find_room(entry, patient=False)
            except NoWorkers:  # the load waits for them, and says so
                room = Room()
            left = self._note_used(room.victims)
            await self._evict(room.victims, entry)
            await self._host.load(entry.order, follower, name=entry.name)
            self._returns.begin(left, entry.name)

    async def make_way(self, name: str) -> bool:
        """Unload idle models so that a loaded one that has lost a worker fits on those that are left.

        It takes as few workers as it needs. Return whether a model left: none does if that would not suffice, or while
        another model makes room for itself.
        """
        catalog = self._host.deployments.catalog
        entry = catalog.get(name)
        if not self.enabled or entry is None or self._turn.locked():
            return False
        order = replace(entry.order, worker_count=None, layers=None, cached_contexts=1)
        async with self._turn:
            try:
                room = await self.find_room(replace(entry, order=order), patient=False)
            except MacpipeError as e:
                log.info("on demand: nothing leaves for a recovery reason=%s model=%s", e.sentence, name)
                return False
            left = self._note_used(room.victims)
            if not room.victims or not await self._evict(room.victims, entry):
                return False
            self._returns.begin(left, name)
            return True

    async def run(self) -> None:
        """Unload models that nobody has used for their ``idle_unload_s``. Never returns."""
        while True:
            await self._sleep(IDLE_CHECK_S)
            await self.unload_idle()

    async def unload_idle(self) -> None:
        """Unload the models that nobody has used for their ``idle_unload_s``, unless they are pinned.

        Forget what is known of models that are no longer in the catalog.
        """
        names = {entry.name for entry in self._host.deployments.catalog}
        self._held_at = {name: at for name, at in self._held_at.items() if name in names}
        self._failures = {name: failure for name, failure in self._failures.items() if name in names}
        self._returns.keep_only(names)
        for entry in self._host.deployments.catalog.entries:
            limit_s = entry.idle_unload_s
            if limit_s is None or entry.pin or not self._is_served(entry.name):
                continue
            deployment = self._host.deployments[entry.name]
            if not deployment.is_loading and self._is_idle(deployment, limit_s):
                log.info("on demand: unloading an idle model model=%s idle_s=%.0f", entry.name, limit_s)
                await deployment.unload(partial(self._is_idle, deployment, limit_s))

    def idle_left_s(self, entry: ModelEntry) -> float | None:
        """Return in how many seconds a model is unloaded if nobody uses it until then; None if it stays."""
        if entry.idle_unload_s is None or entry.pin:
            return None
        deployment, now = self._host.deployments[entry.name], self._clock()
        used_at = now if self._is_busy(deployment) else self._used_at(deployment)
        return max(used_at + entry.idle_unload_s - now, 0.0)

    async def close(self) -> None:
        """Give up the loads that run."""
        loads = (*self._loads.values(), *self._returns.tasks)
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    # Requests

    async def _acquire(self, requested: str | None, wait_s: float | None) -> tuple[str, bool]:
        """Hold a model, or the first of its fallbacks that can be served. Return its name, and whether it is one."""
        first, _ = self._host.deployments.catalog.resolve(requested)
        deadline = None if wait_s is None else self._clock() + wait_s
        refusals = list[MacpipeError]()
        for entry in self._with_fallbacks(first):
            is_late = deadline is not None and self._clock() >= deadline
            if refusals and is_late and not self._is_served(entry.name):
                continue
            self._holds[entry.name] += 1
            held = False
            try:
                error = await self._refusal(entry, deadline)
                held = error is None
            except NotServing as late:
                error = late
            finally:
                if not held:
                    self._release(entry.name)
            if error is None:
                return entry.name, entry is not first
            refusals.append(error)
        raise refusals[0]

    def _with_fallbacks(self, entry: ModelEntry) -> Iterator[ModelEntry]:
        """Yield a model and its fallbacks. The catalog has no circle of these."""
        yield entry
        while entry.fallback:
            entry = self._host.deployments.catalog.find(entry.fallback)
            yield entry

    async def _refusal(self, entry: ModelEntry, deadline: float | None) -> MacpipeError | None:
        """Wait until a model is loaded. Return why it cannot be served; None if it is.

        Raises ``NotServing`` after ``deadline``: it may yet be loaded; and as ``LeadChange.require_going``.
        """
        if self._is_replaced(entry):
            return NotServing(f"{entry.name} has lost a worker, and the others cannot take its layers")
        if self._is_served(entry.name):
            return None
        load = self._begin(entry)
        if load is None:
            return self._failures[entry.name].error
        left_s = None if deadline is None else max(deadline - self._clock(), 0.0)
        if not (await asyncio.wait((load,), timeout=left_s))[0]:
            raise self._still_loading(entry)
        error = NotServing("the coordinator is stopping") if load.cancelled() else load.result()
        if error:
            self._host.deployments.lead_change.require_going()  # it may have failed since the workers are led elsewhere
        return error

    def _begin(self, entry: ModelEntry) -> asyncio.Task[MacpipeError | None] | None:
        """Return the load of a model that is not served, which begins unless it runs; None so soon after a failure."""
        self._host.deployments.lead_change.require_going()
        if load := self._loads.get(entry.name):
            return load
        if self._recent_failure(entry):
            return None
        load = self._loads[entry.name] = asyncio.create_task(self._load(entry))
        return load

    def _recent_failure(self, entry: ModelEntry) -> _Failure | None:
        """Return why a model is not loaded now, though it is asked for; None if a load may begin."""
        failure = self._failures.get(entry.name)
        return failure if failure and failure.order == entry.order and self._clock() < failure.until else None

    def _is_replaced(self, entry: ModelEntry) -> bool:
        """Return whether the fallback of a loaded model answers, since that one cannot recover."""
        return bool(entry.fallback) and self._host.deployments[entry.name].state is ServingState.FAILED

    def _is_served(self, name: str) -> bool:
        return self._host.deployments[name].model_info is not None

    def _still_loading(self, entry: ModelEntry) -> NotServing:
        pause_s = self._pauses.get(entry.name, 0.0) - self._clock()
        if pause_s > 0:
            doing, retry_s = "another model was loaded a moment ago and stays for a while", pause_s
        else:
            doing, retry_s = self._host.deployments[entry.name].watch.sentence, FAILED_RETRY_S
        return NotServing(f"{entry.name} is not loaded yet ({doing}); try again in a moment", retry_after_s=retry_s)

    def _release(self, name: str) -> None:
        self._held_at[name] = self._clock()
        self._holds[name] -= 1
        if not self._holds[name]:
            del self._holds[name]

    # Loads

    async def _load(self, entry: ModelEntry) -> MacpipeError | None:
        """Load a model as soon as there is room. Return why it failed; None if it is served."""
        try:
            await self._host.loads.run(entry.name, self._make_room_and_load(entry))
        except MacpipeError as e:
            self._note_failure(entry, e)
            return e
        except Exception as e:  # a bug; whoever waits must hear of it
            log.exception("on demand: load failed model=%s", entry.name)
            error = MacpipeError(f"{entry.name} could not be loaded: {type(e).__name__}: {e}")
            self._note_failure(entry, error)
            return error
        finally:
            del self._loads[entry.name]
            self._pauses.pop(entry.name, None)
        self._failures.pop(entry.name, None)
        return None

    def _note_failure(self, entry: ModelEntry, error: MacpipeError) -> None:
        log.warning("on demand: not loaded reason=%s model=%s", error.sentence, entry.name)
        before = self._failures.get(entry.name)
        if isinstance(error, DoesNotFit | NotServing):
            retry_s = REFUSED_RETRY_S
        elif before and before.order == entry.order and not isinstance(before.error, DoesNotFit | NotServing):
            retry_s = min(2 * before.retry_s, MAX_FAILED_RETRY_S)
        else:
            retry_s = FAILED_RETRY_S
        self._failures[entry.name] = _Failure(error, entry.order, retry_s, self._clock() + retry_s)

    async def _make_room_and_load(self, entry: ModelEntry) -> None:
        losses = list[MacpipeError]()
        while not self._is_served(entry.name):
            async with self._turn:
                for deployment in self._host.deployments.values():
                    await deployment.wait_loaded()
                if self._is_served(entry.name):
                    return
                room = await self.find_room(entry)
                if not room.wait_s:
                    left = self._note_used(room.victims)
                    if await self._evict(room.victims, entry) and await self._load_once(entry, losses):
                        self._returns.begin(left, entry.name)
                    continue
            self._pauses[entry.name] = self._clock() + room.wait_s
            await self._sleep(room.wait_s)

    async def _load_once(self, entry: ModelEntry, losses: list[MacpipeError]) -> bool:
        """Load a model. If a worker or the room is lost meanwhile, only note it in ``losses``: it is tried again.

        Return whether it is loaded. Raises the error of the load, and the last loss of too many.
        """
        self._returns.forget(entry.name)
        try:
            await self._host.load(entry.order, name=entry.name)
            return True
        except (WorkerLost, DoesNotFit) as e:
            losses.append(e)
            if len(losses) == LOAD_TRIES:
                raise
            log.warning("on demand: loading again reason=%s model=%s", e.sentence, entry.name)
            return False

    async def _load_beside(self, name: str) -> bool:
        """Load a model if there is room for it beside all others. Return whether it was loaded."""
        async with self._turn:
            entry = self._host.deployments.catalog.get(name)
            if entry is None or self._is_served(name) or self._recent_failure(entry):
                return False
            try:
                if await self.find_room(entry, patient=False) != Room():
                    return False
                await self._host.load(entry.order, name=name)
            except MacpipeError as e:
                log.info("on demand: not loaded again reason=%s model=%s", e.sentence, name)
                return False
            return True

    async def find_room(self, entry: ModelEntry, *, patient: bool = True) -> Room:
        """Return which models leave for this one; without ``patient``, no time is waited for models or workers.

        Raises as ``find_room`` and ``Deployment.ask_room``.
        """
        order = entry.order if patient else replace(entry.order, wait_s=0.0)
        question = await self._host.deployments[entry.name].ask_room(order)
        loaded = [one for one in self._host.deployments.values() if one.model_info and one.name != entry.name]
        copies = self._list_copies()
        holders = {one.name: [replica.holder for replica in one.replicas] for one in loaded}
        holders |= {holder: [holder] for holder in copies}

        def refusal(leaving: AbstractSet[str]) -> DoesNotFit | None:
            return question.refusal([holder for name in leaving for holder in holders[name]])

        residents = [self._describe(one) for one in loaded]
        residents += [Resident.of_copy(holder, i) for i, holder in enumerate(copies)]
        now = self._clock() + (0.0 if patient else MIN_RESIDENT_S)
        return await anyio.to_thread.run_sync(find_room, entry.name, residents, refusal, now, question.lacks_macs)

    def _describe(self, deployment: Deployment) -> Resident:
        name, entry = deployment.name, self._host.deployments.catalog.get(deployment.name)
        return Resident(
            name,
            self._used_at(deployment),
            min(deployment.loaded_at, self._used_at(deployment)),
            busy=self._is_busy(deployment),
            pinned=entry is not None and entry.pin,
            priority=entry.priority if entry else 0,
        )

    async def _evict(self, names: Sequence[str], entry: ModelEntry) -> bool:
        """Unload models, and copies of models, for another one. Return False at the first that is no longer idle.

        The requests of a copy go on elsewhere.
        """
        copies = self._list_copies()
        for name in names:
            log.info("on demand: evicting a model model=%s for=%s", name, entry.name)
            if name in copies:
                model, copy = copies[name]
                await model.remove_copy(copy)
                continue
            deployment = self._host.deployments[name]
            if not await deployment.unload(partial(self._is_idle, deployment)):
                return False
        return True

    def _list_copies(self) -> dict[str, tuple[Deployment, Replica]]:
        """Return the copies that may be taken back, with their models, by their holders; as ``newest_first``."""
        return {copy.holder: (model, copy) for model, copy in newest_first(self._host.deployments.copy_goals())}

    def _note_used(self, names: Sequence[str]) -> dict[str, float]:
        """Return when each of those that are models, not copies of one, was used last."""
        return {name: self._used_at(one) for name in names if (one := self._host.deployments.get(name))}

    def _used_at(self, deployment: Deployment) -> float:
        return max(self._returns.used_at(deployment), self._held_at.get(deployment.name, 0.0))

    def _is_busy(self, deployment: Deployment) -> bool:
        return deployment.has_requests or self._holds[deployment.name] > 0

    def _is_idle(self, deployment: Deployment, least_s: float = 0.0) -> bool:
        """Return whether nobody uses a model, and nobody has for at least so many seconds."""
        return not self._is_busy(deployment) and self._clock() - self._used_at(deployment) >= least_s
