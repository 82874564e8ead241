"""Keep the term that this worker has granted: on disk, before its engines, and against calls of any other term.

A grant is answered once it is synced to disk and no engine computes for an earlier term. After that, what a coordinator
of an earlier term still sends is refused. So a worker never computes for two terms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import anyio.to_thread

from cluster.core.errors import InvalidRequest, StaleEpoch, StaleTerm, WorkerTaken
from cluster.core.replication_limits import MAX_COPIES
from cluster.core.term_limits import MAX_TERM, RELEASE_S
from cluster.membership.in_sync import InSyncSet
from cluster.membership.term_record import TermRecord
from cluster.membership.terms import Denial, Process, Term
from cluster.platform.continuous_clock import continuous_seconds
from cluster.platform.overload import Lag, no_lag
from cluster.v1 import worker_pb2 as pb
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.term_file import MAX_ID_CHARS, TermFile

__all__ = ["CoordinatorRequest", "TermKeeper"]

CoordinatorRequest: TypeAlias = (
    pb.LoadStageRequest | pb.SetAdaptersRequest | pb.UnloadStageRequest | pb.DrainWorkerRequest | pb.ResetEngineRequest
)
T = TypeVar("T")
_OTHER = "another coordinator; stop that one, or give yours workers with a --cluster of their own"
_SAME_ID = (
    "another coordinator of the same id: a standby that leads now, or one whose state folder was copied; stop one of "
    "the two, or start it with --home or MACPIPE_HOME set to a folder of its own"
)
_DENIALS = {denial: pb.TermDenial.Value(f"TERM_DENIAL_{denial.name}") for denial in Denial}


class TermKeeper:
    """The term of one worker, whose engines are ``slots``. Lives on one event loop.

    ``engines_gone`` returns whether no engine of an earlier daemon of this worker runs any more: until then it may
    compute for the term that was granted before, and no other is granted.

    Raises ``InvalidOption`` if the file is damaged.
    """

    def __init__(
        self,
        file: TermFile,
        slots: EngineSlots,
        lag: Lag = no_lag,
        engines_gone: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = continuous_seconds,
    ) -> None:
        self._file, self._slots, self._lag, self._engines_gone = file, slots, lag, engines_gone
        stored, self._in_sync = file.read()
        self._record = TermRecord(stored, clock)
        self._writing = asyncio.Lock()
        self._served = self._record.term.number
        """The number of the term that engines may compute for: the granted one, once its fence is complete."""
        self._fences: asyncio.Task[None] | None = None
        self._newest = self._floor = 0
        """The newest epoch, and the newest one of earlier terms. So an epoch number belongs to one term."""
        self._heard_at = -RELEASE_S
        self._writes: set[asyncio.Task[Any]] = set()

    @property
    def number(self) -> int:
        """The number of the granted term; 0 if there never was one."""
        return self._record.term.number

    @property
    def leader(self) -> str:
        """The id of the coordinator that this worker is kept for; "" for none."""
        return self._record.term.process.leader if self._record.has_lease(self._lag()) else ""

    @property
    def leader_process(self) -> str:
        """The process that this worker is kept for, even from its own restart; "" for none."""
        return self._record.term.process.instance if self._record.has_lease() else ""

    @property
    def is_needed(self) -> bool:
        """Whether it holds a slice whose coordinator was heard recently, so that its layers may be moved away."""
        return bool(self._slots.held) and time.monotonic() - self._heard_at < RELEASE_S

    def hear(self, process: Process, number: int) -> None:
        """Take a coordinator's heartbeat, which renews its lease while this worker holds or loads something."""
        term = Term(number, process)
        if (self._slots.held or self._slots.loading) and self._record.renew(term) is None:
            self._heard_at = time.monotonic()

    def release(self) -> None:
        """End the lease if nothing is held or loaded any more: its coordinator does not need this worker."""
        if not self._slots.held and not self._slots.loading:
            self._record.give_back(self._record.term)

    async def answer(self, request: pb.GrantTermRequest) -> pb.GrantTermResponse:
        """Do what a coordinator asks for. Raises ``InvalidRequest``, and the error of a term that cannot be stored."""
        term = _read_term(request.coordinator, request.instance, request.term)
        match request.request:
            case pb.TERM_REQUEST_ASK:
                denial = self._record.why_not(term.process, self._lag())
            case pb.TERM_REQUEST_GRANT:
                denial = await self._shield(self._grant(term))
            case pb.TERM_REQUEST_RENEW:
                denial = self._record.renew(term) or await self._end_fence(term)
            case pb.TERM_REQUEST_RETURN:
                self._record.give_back(term)
                denial = None
            case _:
                raise InvalidRequest("an unknown request for a term", field="request")
        return self._encode(denial, request.coordinator)

    async def _shield(self, write: Coroutine[Any, Any, T]) -> T:
        """Run a write to its end, even if the caller goes away."""
        task = asyncio.create_task(write)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    async def _grant(self, term: Term) -> Denial | None:
        if term != self._record.term and not self._engines_gone():
            return Denial.BUSY
        if denial := self._record.begin(term, self._lag()):
            return denial
        if term == self._record.term:
            return self._record.finish(written=True) or await self._end_fence(term)
        async with self._writing:
            written = False
            try:
                await anyio.to_thread.run_sync(self._file.write, term, self._in_sync)
                written = True
            finally:
                denial = self._record.finish(written=written)
        self._floor = self._newest
        self._fences = asyncio.create_task(self._fence(term.number))
        return denial or await self._end_fence(term)

    async def _fence(self, number: int) -> None:
        await self._slots.fence()
        self._served = max(self._served, number)

    async def _end_fence(self, term: Term) -> Denial | None:
        """Wait until no engine computes for an earlier term. Return a denial if there is a later term by then."""
        while self._served < self.number and self._fences:
            await asyncio.shield(self._fences)
        return None if term == self._record.term else Denial.OLD

    async def name_in_sync(self, request: pb.NameInSyncRequest) -> None:
        """Store a leader's set on disk. One that is older than the stored set changes nothing.

        Raises ``InvalidRequest``, ``StaleTerm`` if this worker has granted another term, and the error of a set that
        cannot be stored.
        """
        named = request.in_sync
        term = _read_term(request.coordinator, request.instance, named.term)
        if not named.version or len(named.replicas) > MAX_COPIES or not all(map(_is_id, named.replicas)):
            raise InvalidRequest("a set of copies in sync has a version and their ids", field="in_sync")
        await self._shield(self._store_in_sync(term, InSyncSet(named.term, named.version, tuple(named.replicas))))

    async def _store_in_sync(self, term: Term, in_sync: InSyncSet) -> None:
        async with self._writing:
            if term != self._record.term:
                raise self._stale(term.number)
            if in_sync > self._in_sync:
                await anyio.to_thread.run_sync(self._file.write, term, in_sync)
                self._in_sync = in_sync

    def refuse_others(self, request: CoordinatorRequest) -> None:
        """Raise ``WorkerTaken`` while this worker is kept for another coordinator, or another process of the same."""
        if self._record.term.process == Process(request.coordinator, request.instance):
            return
        if self.leader not in ("", request.coordinator):
            raise WorkerTaken(self._taken(_OTHER))
        if self.leader == request.coordinator and self.leader_process:
            raise WorkerTaken(self._taken(_SAME_ID))

    def _taken(self, by: str) -> str:
        held = next((slot.held.model for slot in self._slots.held if slot.held), "")
        return f"it serves {held} for {by}" if held else f"it is kept for {by}"

    def require(self, number: int) -> None:
        """Raise ``StaleTerm`` unless ``number`` is that of the term that the engines compute for."""
        if not number or number != self.number or number != self._served:
            raise self._stale(number)

    def require_process(self, request: pb.UnloadStageRequest | pb.ResetEngineRequest) -> None:
        """Raise ``StaleTerm`` unless the process leads by the granted term, or has gone on to a later one elsewhere."""
        process = Process(request.coordinator, request.instance)
        if request.term < self.number or (self.number and process != self._record.term.process):
            raise self._stale(request.term)

    def accept_epoch(self, epoch: int) -> None:
        """Raise ``StaleEpoch`` for the epoch of a load that is not newer than all epochs of earlier terms."""
        if epoch <= self._floor:
            why = f"asked to load epoch {epoch}, but epoch {self._floor} was loaded in an earlier term"
            raise StaleEpoch(why, epoch=str(self._floor))
        self._newest = max(self._newest, epoch)

    def _stale(self, number: int) -> StaleTerm:
        granted = f"term {self.number}" if self.number else "none"
        return StaleTerm(f"the call is of term {number}, but this worker has granted {granted}")

    def _encode(self, denial: Denial | None, caller: str) -> pb.GrantTermResponse:
        granted = self._record.term
        problem = ""
        if denial is Denial.LEASED:
            problem = self._taken(_SAME_ID if granted.process.leader == caller else _OTHER)
        elif denial is Denial.BUSY:
            problem = "it is being granted to another coordinator, or an engine of its earlier process still ends"
        elif denial:
            problem = f"it has granted term {granted.number} already"
        return pb.GrantTermResponse(
            denial=_DENIALS[denial] if denial else pb.TERM_DENIAL_UNSPECIFIED,
            term=granted.number,
            coordinator=granted.process.leader,
            instance=granted.process.instance,
            problem=problem,
            in_sync=pb.InSyncSet(
                term=self._in_sync.term, version=self._in_sync.version, replicas=self._in_sync.replicas
            ),
            newest_epoch=max(self._newest, self._floor),
        )


def _read_term(coordinator: str, instance: str, number: int) -> Term:
    """Return the term that a request names. Raises ``InvalidRequest``."""
    if not _is_id(coordinator) or not _is_id(instance) or number > MAX_TERM:
        raise InvalidRequest("a term has a number, a coordinator and a process", field="term")
    return Term(number, Process(coordinator, instance))


def _is_id(value: str) -> bool:
    return 0 < len(value) <= MAX_ID_CHARS and value.isprintable()
