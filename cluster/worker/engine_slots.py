"""The engines of one worker: the first, which always runs, and one more for each further slice that it holds.

Decides which engine loads a slice, and frees what has to leave memory for it. It knows epochs and the requests that
load slices; of an engine it knows the supervisor.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import anyio
from anyio.abc import TaskGroup

from cluster.core.errors import DoesNotFit, MacpipeError, StaleEpoch
from cluster.core.limits import MAX_SLICES
from cluster.core.text import gib_in_words
from cluster.platform.overload import Lag, no_lag
from cluster.v1 import worker_pb2 as pb
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.pipe_messages import Hello, Reported, Unload
from cluster.worker.supervisor import Supervisor

__all__ = ["EngineSlot", "EngineSlots", "SlotReport"]

log = logging.getLogger(__name__)
_NO_ENGINE = Hello(0, "", "", "", "", 0, 0)


@dataclass(eq=False)
class EngineSlot:
    """One engine, the slice that it holds, and the one that it is about to load. ``number`` is that of ``Begin``."""

    number: int
    supervisor: Supervisor
    coming: pb.LoadStageRequest | None = None
    """The request of the slice that is being fetched or loaded."""
    fingerprint: str = ""
    """The checkpoint that the engine reads, which may be a quantized copy; "" for none."""
    is_rank: bool = False
    """Whether the engine is for one rank of one group. MLX cannot leave a group, so it loads nothing else."""
    _loaded: pb.LoadStageRequest | None = None
    _loading_engine: Hello | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def held(self) -> pb.LoadStageRequest | None:
        """The request of the loaded slice; None if the engine that loaded it has ended."""
        engine = self._loading_engine
        return self._loaded if engine is not None and engine is self.supervisor.hello else None

    @property
    def requests(self) -> list[pb.LoadStageRequest]:
        """The requests of the slices that are loaded or coming."""
        return [request for request in (self.held, self.coming) if request]

    @property
    def memory_limit(self) -> int:
        """The bytes that its slice may use; 0 without a slice, or if it may use all."""
        return max((request.memory_limit for request in self.requests), default=0)

    def hold(self, request: pb.LoadStageRequest | None) -> None:
        """Note that the present engine holds this slice, or none."""
        self._loaded, self._loading_engine = request, self.supervisor.hello
        if request is None:
            self.fingerprint = ""

    def holds_like(self, request: pb.LoadStageRequest) -> bool:
        """Return whether the slice of another epoch is the one that ``request`` asks for."""
        held = self.held
        return held is not None and _load_key(held) == _load_key(request)


@dataclass(frozen=True, slots=True)
class SlotReport:
    """What one engine reports. ``problem`` says why it does not answer; "" if it does."""

    slot: EngineSlot
    report: Reported
    problem: str


class EngineSlots:
    """All engines of a worker. Lives on one event loop."""

    def __init__(self, launcher: EngineLauncher, lag: Lag = no_lag) -> None:
        self._launcher, self._lag = launcher, lag
        self.first = EngineSlot(0, Supervisor(launcher, lag))
        self._further: list[EngineSlot] = []
        self._tasks: TaskGroup | None = None

    def __iter__(self) -> Iterator[EngineSlot]:
        return iter((self.first, *self._further))

    @property
    def hello(self) -> Hello:
        """What a running engine says of itself and of the device: the first one, if it runs."""
        return next((slot.supervisor.hello for slot in self if slot.supervisor.hello), _NO_ENGINE)

    @property
    def loading(self) -> bool:
        """Whether a slice is being fetched or loaded."""
        return any(slot.coming for slot in self)

    @property
    def held(self) -> list[EngineSlot]:
        """The engines that hold a slice."""
        return [slot for slot in self if slot.held]

    def fingerprints(self) -> frozenset[str]:
        """Return the fingerprints of the checkpoints that the engines read or hold."""
        return frozenset(slot.fingerprint for slot in self if slot.requests)

    def holder(self, epoch: int) -> EngineSlot:
        """Return the engine that holds or loads a slice of this epoch; without one, the first, which refuses it."""
        return next((slot for slot in self if any(r.epoch == epoch for r in slot.requests)), self.first)

    async def run(self) -> None:
        """Run the engines until cancelled. Raises the error with which the first engine fails to start."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self.first.supervisor.run)

    async def report(self) -> list[SlotReport]:
        """Ask all engines for a report, at once."""
        return await asyncio.gather(*map(_ask_report, self))

    async def fence(self) -> None:
        """Return once no engine computes for what is loaded now. Slices stay loaded, for another epoch."""
        await asyncio.gather(*(slot.supervisor.fence() for slot in self))

    @asynccontextmanager
    async def load(self, request: pb.LoadStageRequest) -> AsyncIterator[EngineSlot]:
        """Choose the engine for a slice, and free all slices that the request does not keep. Load within the context.

        Raises ``StaleEpoch`` if a slice that is not kept is newer, ``DoesNotFit`` if the worker has no room, and
        ``WorkerLost`` if a further engine cannot be started.
        """
        slot, others = self._choose(request)
        try:
            for other in others:
                await self._free(other)
            if slot.number:
                await slot.supervisor.wait_started()
            yield slot
            slot.hold(request)
        finally:
            if slot.coming is request:
                slot.coming = None
            if slot.number and not slot.requests:
                with anyio.CancelScope(shield=True):
                    await self._stop(slot)

    @asynccontextmanager
    async def lend_rank(self) -> AsyncIterator[Supervisor]:
        """Run a further engine within the context, which may join a group and loads nothing. A load may end it.

        Raises ``WorkerLost`` if it cannot be started.
        """
        slot = self._start()
        slot.is_rank = True
        try:
            await slot.supervisor.wait_started()
            yield slot.supervisor
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop(slot)

    def _choose(self, request: pb.LoadStageRequest) -> tuple[EngineSlot, list[EngineSlot]]:
        """Return the engine that loads a slice, and those that have to free theirs.

        It is the one that holds the slice already, else the first one that is not kept, else a new one. The rank of a
        group always gets a new one. Beside other slices, no load waits for an engine that is down: another model's
        recovery may need that one.
        """
        kept = [slot for slot in self if any(r.epoch in request.keep for r in slot.requests)]
        for held in (slot.held for slot in kept):
            if held:  # it may be from before its coordinator restarted
                held.instance = request.instance
        others = [slot for slot in self if slot not in kept]
        newest = max((slot.held.epoch for slot in others if slot.held), default=0)
        if request.epoch < newest:
            why = f"asked to load epoch {request.epoch}, but epoch {newest} is loaded"
            raise StaleEpoch(why, epoch=str(newest))
        self._require_room(request, kept)
        usable = [slot for slot in others if not (slot.scope.cancel_called or slot.is_rank)]
        if request.keep:
            usable = [slot for slot in usable if not slot.supervisor.problem]
        chosen = min(usable, key=lambda slot: (not slot.holds_like(request), slot.number), default=None)
        if chosen is None or request.ranks > 1:
            chosen = self._start()
            chosen.is_rank = request.ranks > 1
        chosen.hold(None)
        chosen.coming = request
        return chosen, [slot for slot in others if slot is not chosen]

    def _require_room(self, request: pb.LoadStageRequest, kept: list[EngineSlot]) -> None:
        """Raise ``DoesNotFit`` if the slices would need more memory than this worker may use, or are too many."""
        if len(kept) >= MAX_SLICES:
            raise DoesNotFit(f"this worker holds {len(kept)} slices of models already, as many as it may")
        limit, used = self.hello.memory_limit, sum(slot.memory_limit for slot in kept)
        if request.memory_limit and limit and used + request.memory_limit > limit:
            raise DoesNotFit(
                f"{request.model} needs {gib_in_words(request.memory_limit)} here, but other models hold "
                f"{gib_in_words(used)} of the {gib_in_words(limit)} that this worker may use",
                missing_bytes=str(used + request.memory_limit - limit),
            )

    def _start(self) -> EngineSlot:
        """Begin to start a further engine."""
        assert self._tasks
        taken = {slot.number for slot in self}
        number = next(n for n in itertools.count(1) if n not in taken)
        slot = EngineSlot(number, Supervisor(self._launcher, self._lag, number))
        self._further.append(slot)
        self._tasks.start_soon(self._run_further, slot)
        return slot

    async def _run_further(self, slot: EngineSlot) -> None:
        """Run an engine until it ends or its scope is cancelled. It is not started again: its slice is lost anyway."""
        try:
            with slot.scope:
                await slot.supervisor.run_once()
                log.error("engine: a further one ended reason=%s number=%d", slot.supervisor.problem, slot.number)
        finally:
            self._further.remove(slot)
            slot.ended.set()

    async def unload(self, request: pb.UnloadStageRequest) -> None:
        """Free the slices of the request's epoch and of older ones, except those that it keeps.

        Raises ``WorkerLost`` if the first engine is down.
        """
        for slot in reversed(list(self)):
            epochs = [r.epoch for r in slot.requests]
            if any(epoch in request.keep or epoch > request.epoch for epoch in epochs):
                continue
            if slot.number:
                await self._stop(slot)
            else:
                await self._unload_first(request.epoch)

    async def _free(self, slot: EngineSlot) -> None:
        if slot.number:
            await self._stop(slot)
        elif epochs := [r.epoch for r in slot.requests]:
            with suppress(MacpipeError):  # an engine that is down holds nothing
                await self._unload_first(max(epochs))

    async def _unload_first(self, epoch: int) -> None:
        await self.first.supervisor.ask(partial(Unload, epoch=epoch))
        self.first.hold(None)

    async def _stop(self, slot: EngineSlot) -> None:
        """End a further engine, which frees its memory. A rank is not asked to end: it may wait for others in MLX."""
        if slot.is_rank:
            slot.supervisor.reset("its group is dissolved")
        slot.scope.cancel()
        await slot.ended.wait()

    def reset(self, epoch: int, why: str) -> None:
        """Kill the engine that holds a slice of this epoch; for epoch 0, the first. Do nothing if there is none."""
        slot = self.holder(epoch)
        if epoch and slot.requests and all(request.epoch != epoch for request in slot.requests):
            return
        slot.hold(None)
        slot.supervisor.reset(why)


async def _ask_report(slot: EngineSlot) -> SlotReport:
    try:
        return SlotReport(slot, await slot.supervisor.report(), "")
    except MacpipeError as e:
        return SlotReport(slot, Reported(0, 0, 0), e.sentence or "the engine is stopping")


def _load_key(r: pb.LoadStageRequest) -> tuple[str, int, int, int, int]:
    return r.fingerprint, r.start_layer, r.end_layer, r.kv_bits, r.weight_bits
