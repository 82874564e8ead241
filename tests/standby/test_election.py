"""A candidate asks real records of workers: it takes a full ring, and nothing while the leader lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.term_limits import LEASE_S
from cluster.core.worker import HeldSlice, WorkerInfo
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.term_record import TermRecord
from cluster.membership.terms import Process, Term, TermAnswer, TermCall, TermRequest
from cluster.standby import election as module
from cluster.standby.election import Election

LEADER, STANDBY = Process("service", "1"), Process("service", "2")


@dataclass
class Clock:
    now: float = 50.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Worker:
    """A worker with a record of its own. It does not answer while ``gone``, and with ``refusal`` if there is one."""

    name: str
    clock: Clock
    gone: bool = False
    refusal: MacpipeError | None = None
    in_sync: InSyncSet = NOT_NAMED
    newest_epoch: int = 0
    described: int = 0
    info: WorkerInfo = field(init=False)

    def __post_init__(self) -> None:
        self.address = f"{self.name}:1"
        self.record = TermRecord(None, self.clock)
        self.info = WorkerInfo(f"id-{self.name}", self.name, "", self.address, "", "", "", "", 0, 10)

    def grant(self, term: Term) -> None:
        assert self.record.begin(term) is self.record.finish(written=True) is None

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        await asyncio.sleep(0)
        self.described += 1
        if self.gone:
            raise WorkerLost(f"worker {self.name} does not answer", worker=self.name)
        if self.refusal:
            raise self.refusal
        return self.info, ""

    async def request_term(self, call: TermCall) -> tuple[TermAnswer, str]:
        await self.describe(1.0)
        match call.request:
            case TermRequest.ASK:
                denial = self.record.why_not(call.term.process)
            case TermRequest.GRANT:
                denial = self.record.begin(call.term) or self.record.finish(written=True)
            case _:
                denial = None
                self.record.give_back(call.term)
        return TermAnswer(call, denial, self.record.term, self.in_sync, self.newest_epoch), ""


class Workers:
    """A roster of these workers. One of another version is foreign."""

    def __init__(self, *names: str) -> None:
        self.clock = Clock()
        self.asked = False
        self.all = [Worker(name, self.clock) for name in names]
        for worker in self.all:
            worker.grant(Term(5, LEADER))

    def addresses(self) -> set[str]:
        return {worker.address for worker in self.all}

    def control(self, address: str) -> Worker:
        self.asked = True
        return next(worker for worker in self.all if worker.address == address)

    def why_foreign(self, info: WorkerInfo) -> str:
        return info.version

    @property
    def terms_of_workers(self) -> list[int]:
        return [worker.record.term.number for worker in self.all]

    def election(self, least: int) -> Election:
        return Election(STANDBY, self, lambda found: len(found) >= least, self.clock, lambda: 0.0)


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(18):
        while not seen():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all workers answer before an election that is won ends, however slow this machine is."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 2.0)


@pytest.mark.anyio
async def test_a_candidate_takes_all_that_answer_once_the_leases_are_over_and_knows_the_newest_epoch() -> None:
    workers = Workers("ada", "bob", "cyd", "dee")
    ada, bob, cyd, dee = workers.all
    cyd.gone = True
    dee.in_sync, dee.newest_epoch = InSyncSet(5, 2, ("b",)), 11
    bob.in_sync = InSyncSet(5, 1, ("a", "b"))
    ada.info = replace(ada.info, epoch=7, slices=(HeldSlice(7), HeldSlice(9)))
    bob.info = replace(bob.info, epoch=8, slices=(HeldSlice(8),))
    election = workers.election(2)
    running = asyncio.create_task(election.run())
    await until(lambda: len(election.denials) == 3)
    assert workers.terms_of_workers == [5] * 4, "the leader's leases last"
    assert {answer.granted for answer in election.denials.values()} == {Term(5, LEADER)}
    workers.clock.now += LEASE_S
    leadership = await running
    assert leadership.term == Term(6, STANDBY)
    assert leadership.workers == {"ada:1", "bob:1", "dee:1"}
    assert workers.terms_of_workers == [6, 6, 5, 6]
    assert election.newest_epoch == 11
    assert election.in_sync == dee.in_sync, "all have answered, although two of them are enough"


@pytest.mark.anyio
async def test_a_candidate_that_reaches_too_few_changes_nothing() -> None:
    workers = Workers("ada", "bob", "cyd")
    workers.clock.now += LEASE_S
    ada, bob, _ = workers.all
    bob.gone = True
    ada.info = replace(ada.info, version="of another version")
    running = asyncio.create_task(workers.election(2).run())
    for asked in (1, 2):
        workers.clock.now += 1.0
        await until(lambda asked=asked: bob.described >= asked)  # type: ignore[misc]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert workers.terms_of_workers == [5, 5, 5]


@pytest.mark.anyio
async def test_an_election_that_is_given_up_gives_back_what_was_granted() -> None:
    workers = Workers("ada", "bob")
    workers.clock.now += LEASE_S
    ada, bob = workers.all
    request_term = bob.request_term

    async def hang_before_a_grant(call: TermCall) -> tuple[TermAnswer, str]:
        if call.request is TermRequest.GRANT:
            await asyncio.Event().wait()
        return await request_term(call)

    bob.request_term = hang_before_a_grant  # type: ignore[method-assign]
    running = asyncio.create_task(workers.election(2).run())
    await until(lambda: ada.record.term.number == 6)
    assert ada.record.has_lease()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not ada.record.has_lease()
    assert ada.record.why_not(LEADER) is None
