"""Try to become the leader of workers whose leader is lost. The rules are those of ``cluster.membership``."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final, Protocol, TypeAlias

import anyio

from cluster.coordinator.term_holder import TermWorker
from cluster.core.errors import MacpipeError, MemberRemoved
from cluster.core.limits import GONE_S, HEARTBEAT_S
from cluster.core.term_limits import ASK_AGAIN_S
from cluster.core.worker import WorkerInfo
from cluster.membership.candidacy import LeaderCandidate
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.leadership import Leadership
from cluster.membership.terms import NO_TERM, Process, TermAnswer, TermCall, TermRequest
from cluster.platform.continuous_clock import continuous_seconds

__all__ = ["CandidateWorker", "Election", "FitsWorkers", "MayLead"]

_MOST_NAMED: Final = 3
"""How many workers' refusals are named, in one line."""
MayLead: TypeAlias = Callable[[InSyncSet], bool]
"""Whether to lead now, if this is the latest set of copies in sync that the workers name."""
FitsWorkers: TypeAlias = Callable[[Sequence[WorkerInfo]], bool]
"""Whether these workers can hold what is to be served."""


class CandidateWorker(TermWorker, Protocol):
    """A worker's client, as far as an election is concerned."""

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        """Return the worker's description, and its problem. Raises ``WorkerLost``, and the worker's error."""


class CandidateRoster(Protocol):
    """The workers that may be led."""

    def addresses(self) -> set[str]:
        """Return the control addresses of all workers that are known."""

    def control(self, address: str) -> CandidateWorker:
        """Return the client of the worker at an address."""

    def why_foreign(self, info: WorkerInfo) -> str:
        """Return why a worker that answered cannot be led by any coordinator of this version; "" if it can."""


class Election:
    """One candidate for the workers of ``roster``. Nobody waits for a worker that does not answer."""

    def __init__(
        self,
        process: Process,
        roster: CandidateRoster,
        fits: FitsWorkers,
        clock: Callable[[], float] = continuous_seconds,
        draw: Callable[[], float] = random.random,
        may_lead: MayLead = lambda named: True,
    ) -> None:
        self._roster, self._fits_workers, self._may_lead = roster, fits, may_lead
        self._candidate = LeaderCandidate(process, (), self._fits, clock, draw)
        self._found: dict[str, WorkerInfo] = {}
        """What each worker said of itself last, by address."""
        self.newest_epoch = 0
        """The newest epoch that any worker holds a slice of, or was asked to load."""
        self.in_sync = NOT_NAMED
        """The latest set of copies in sync that any worker was told."""
        self._refusals: dict[str, str] = {}
        """Why each worker could not be asked, or would not grant a term, by address."""
        self._removal: MemberRemoved | None = None
        """A worker's word that this Mac was removed from the cluster."""
        self._decided = asyncio.Event()
        self._asking: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Leadership:
        """Return the leadership once it is won, which may be never. If cancelled, give back what was granted.

        The other workers have one more heartbeat's time to answer: ``in_sync`` is then what all of them know. Raises
        ``MemberRemoved`` once a worker says that this Mac was removed from the cluster.
        """
        try:
            while not self._decided.is_set():
                self._candidate.workers = frozenset(self._roster.addresses())
                self._start(self._candidate.step())
                with suppress(TimeoutError):
                    async with asyncio.timeout(ASK_AGAIN_S / 2):
                        await self._decided.wait()
            if self._removal:
                await self.withdraw()
                raise self._removal
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=HEARTBEAT_S)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self.withdraw()
            raise
        finally:
            for task in self._tasks:
                task.cancel()
        leadership = self._candidate.leadership
        assert leadership
        return leadership

    async def withdraw(self) -> None:
        """Give back what was granted, or may have been."""
        leadership = self._candidate.leadership
        calls = leadership.step_down() if leadership else self._candidate.see(NO_TERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(GONE_S):
                sent = (self._roster.control(call.worker).request_term(call) for call in calls)
                await asyncio.gather(*sent, return_exceptions=True)

    def clients(self, addresses: Collection[str]) -> list[CandidateWorker]:
        """Return the clients of the workers at these addresses."""
        return [self._roster.control(address) for address in addresses]

    @property
    def found(self) -> frozenset[str]:
        """The addresses at which a worker has answered that may be led."""
        return frozenset(self._found)

    @property
    def denials(self) -> Mapping[str, TermAnswer]:
        """Why workers refused last, by address."""
        return self._candidate.denials

    @property
    def problem(self) -> str:
        """Why it is not won yet."""
        known = self._roster.addresses()
        refusals = "; ".join(
            [self._refusals[address] for address in sorted(known & self._refusals.keys())][:_MOST_NAMED]
        )
        if refusals:
            return refusals
        return "the workers that answer cannot hold the model" if self._found else "no worker answers"

    def _fits(self, addresses: frozenset[str]) -> bool:
        found = [self._found[address] for address in sorted(addresses) if address in self._found]
        return self._may_lead(self.in_sync) and self._fits_workers(found)

    def _start(self, calls: Sequence[TermCall]) -> None:
        """Send calls, each in a task of its own. A worker that has not answered a question is not asked again."""
        for call in calls:
            asks = call.request is TermRequest.ASK
            if not (asks and call.worker in self._asking):
                self._asking |= {call.worker} if asks else set()
                task = asyncio.create_task(self._send(call))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _send(self, call: TermCall) -> None:
        worker, asks = self._roster.control(call.worker), call.request is TermRequest.ASK
        try:
            if asks and not await self._describe(worker):
                return
            answer, refusal = await worker.request_term(call)
        except MacpipeError as e:
            self._refusals[call.worker] = e.sentence
            if isinstance(e, MemberRemoved):
                self._removal = e
                self._decided.set()
            return  # it is asked again in the next round
        finally:
            if asks:
                self._asking.discard(call.worker)
        if answer.denial:
            self._refusals[call.worker] = f"worker {worker.name}: {refusal}"
        else:
            self._refusals.pop(call.worker, None)
        self.in_sync = max(self.in_sync, answer.in_sync)
        self.newest_epoch = max(self.newest_epoch, answer.newest_epoch)
        self._start(self._candidate.on_answer(answer))
        if self._candidate.leadership:
            self._decided.set()

    async def _describe(self, worker: CandidateWorker) -> bool:
        """Ask a worker what it is. Return whether it may be led. Raises as ``describe``."""
        info, _ = await worker.describe(GONE_S)
        if info.draining or (foreign := self._roster.why_foreign(info)):
            self._found.pop(worker.address, None)
            why = "it is draining" if info.draining else foreign
            self._refusals[worker.address] = f"worker {info.name}: {why}"
            return False
        self._found[worker.address] = info
        self.newest_epoch = max(self.newest_epoch, info.epoch, *(held.epoch for held in info.slices))
        return True
