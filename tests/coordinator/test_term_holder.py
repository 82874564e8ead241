"""One term over all workers of a load: taken, kept, joined, and raised only if it must be."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from cluster.coordinator.term_holder import TermHolder
from cluster.core.errors import NotLeader, StaleTerm, WorkerLost, WorkerTaken
from cluster.core.limits import HEARTBEAT_S
from cluster.core.term_limits import LEASE_S
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.leadership import Leadership
from cluster.membership.term_record import TermRecord
from cluster.membership.terms import Denial, Process, Term, TermAnswer, TermCall, TermRequest

ME, OTHER = Process("me", "1"), Process("other", "1")


@dataclass
class Clock:
    now: float = 50.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Worker:
    """A worker with a record of its own. It never answers while it ``hangs``, and cannot be reached while ``gone``."""

    name: str
    clock: Clock
    gone: bool = False
    hangs: bool = False
    in_sync: InSyncSet = NOT_NAMED
    asked: list[TermRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address = f"{self.name}:1"
        self.record = TermRecord(None, self.clock)

    def grant(self, term: Term) -> None:
        assert self.record.begin(term) is self.record.finish(written=True) is None

    async def request_term(self, call: TermCall) -> tuple[TermAnswer, str]:
        await asyncio.sleep(0)
        self.asked.append(call.request)
        if self.hangs:
            await asyncio.Event().wait()
        if self.gone:
            raise WorkerLost(f"worker {self.name} does not answer", worker=self.name)
        denial = None
        match call.request:
            case TermRequest.ASK:
                denial = self.record.why_not(call.term.process)
            case TermRequest.GRANT:
                denial = self.record.begin(call.term) or self.record.finish(written=True)
            case TermRequest.RENEW:
                denial = self.record.renew(call.term)
            case TermRequest.RETURN:
                self.record.give_back(call.term)
        problem = "it serves llama for another coordinator" if denial else ""
        return TermAnswer(call, denial, self.record.term, self.in_sync), problem


@pytest.fixture
def workers() -> list[Worker]:
    clock = Clock()
    return [Worker(name, clock) for name in ("ada", "bob", "cyd")]


def holder(workers: Sequence[Worker]) -> TermHolder:
    return TermHolder(ME, workers[0].clock, lambda: 0.0)


def numbers(workers: Sequence[Worker]) -> list[int]:
    return [worker.record.term.number for worker in workers]


@pytest.mark.anyio
async def test_a_term_is_above_all_numbers_of_its_workers_and_stays_for_the_next_load(workers: list[Worker]) -> None:
    ada, bob, cyd = workers
    bob.grant(Term(6, OTHER))
    bob.record.give_back(Term(6, OTHER))
    ada.in_sync, bob.in_sync = InSyncSet(6, 2, ("a",)), InSyncSet(6, 3, ("b",))
    mine = holder(workers)
    assert (mine.number, mine.in_sync) == (0, NOT_NAMED)
    await mine.take([ada, bob])
    assert mine.in_sync == bob.in_sync
    assert (numbers(workers), mine.number) == ([7, 7, 0], 7)
    for worker in workers:
        worker.asked.clear()
    await mine.take([ada, bob, cyd])
    assert numbers(workers) == [7, 7, 7]
    assert [worker.asked for worker in workers] == [[TermRequest.GRANT]] * 3, "a term that is there is renewed"


@pytest.mark.anyio
async def test_a_worker_beyond_the_term_raises_it_for_all_that_are_led(workers: list[Worker]) -> None:
    ada, bob, cyd = workers
    mine = holder(workers)
    await mine.take([ada, bob])
    cyd.grant(Term(9, OTHER))
    with pytest.raises(WorkerTaken, match="worker cyd: it serves llama for another coordinator"):
        await mine.take([bob, cyd])
    assert (numbers(workers), mine.number) == ([1, 1, 9], 1)
    cyd.clock.now += LEASE_S
    await mine.take([bob, cyd])
    assert (numbers(workers), mine.number) == ([10, 10, 10], 10), "heartbeats name one number"


@pytest.mark.anyio
async def test_what_was_granted_is_given_back_if_a_worker_does_not_answer(workers: list[Worker]) -> None:
    ada, bob, _ = workers
    mine = holder(workers)
    await mine.take([ada])
    bob.gone = True
    with pytest.raises(WorkerLost):
        await mine.take([ada, bob])
    assert ada.record.has_lease()
    fresh = holder(workers)
    ada.clock.now += LEASE_S
    with pytest.raises(WorkerLost):
        await fresh.take([ada, bob])
    assert fresh.number == 0
    bob.gone = False
    await fresh.take([ada, bob])
    assert fresh.number == 2


@pytest.mark.anyio
async def test_a_worker_that_is_taken_at_every_try_ends_the_load(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = holder(workers)
    monkeypatch.setattr(workers[0].record, "begin", lambda asked: Denial.OLD)
    with pytest.raises(StaleTerm, match="worker ada: it serves llama for another coordinator; try again"):
        await mine.take(workers[:1])


@pytest.mark.anyio
async def test_workers_that_come_back_at_other_addresses_are_not_remembered_for_ever(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.coordinator.term_holder.MAX_ROSTER", 2)
    mine = holder(workers)
    for worker in workers:
        await mine.take([worker])
    assert list(mine._led) == ["bob:1", "cyd:1"]


@pytest.mark.anyio
async def test_two_loads_at_once_take_one_term(workers: list[Worker]) -> None:
    mine = holder(workers)
    await asyncio.gather(mine.take(workers[:2]), mine.take(workers[1:]))
    assert numbers(workers) == [1, 1, 1]


async def settle() -> None:
    """Let everything run that needs no more than the event loop's next turns."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.anyio
async def test_with_standbys_spares_are_renewed_and_asked_before_they_are_taken(workers: list[Worker]) -> None:
    ada, bob, cyd = workers
    mine = holder(workers)
    await mine.renew(workers)
    assert numbers(workers) == [0, 0, 0], "without a term there is nothing to renew"
    await mine.take([ada])
    cyd.grant(Term(9, OTHER))
    for worker in workers:
        worker.asked.clear()
    for _ in range(5):
        ada.clock.now += HEARTBEAT_S
        cyd.record.renew(Term(9, OTHER))
        await mine.renew(workers)
        await settle()
    assert [ada.asked, bob.asked[:2]] == [[TermRequest.RENEW] * 5, [TermRequest.ASK, TermRequest.GRANT]]
    assert bob.asked[2:] == [TermRequest.RENEW] * 4
    assert set(cyd.asked) == {TermRequest.ASK}, "who is led by another is left alone"
    assert numbers(workers) == [1, 1, 9]
    assert bob.record.has_lease()


@pytest.mark.anyio
async def test_a_worker_that_never_answers_is_asked_again_later(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, bob, _ = workers
    mine = holder(workers)
    await mine.take([ada, bob])
    monkeypatch.setattr("cluster.coordinator.term_holder.GONE_S", 0.0)
    monkeypatch.setattr("cluster.coordinator.term_holder.FENCE_S", 0.0)
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    bob.hangs = True
    ada.clock.now += HEARTBEAT_S
    await mine.renew([])
    while mine._asking:
        await asyncio.sleep(0)
    gc.collect()
    assert unseen == [], "no traceback reaches the console"
    bob.hangs = False
    bob.asked.clear()
    ada.clock.now += HEARTBEAT_S
    monkeypatch.undo()
    await mine.renew([])
    await settle()
    assert bob.asked == [TermRequest.RENEW]


@pytest.mark.anyio
async def test_who_gave_its_workers_back_takes_none_any_more(workers: list[Worker]) -> None:
    ada, bob, cyd = workers
    mine = holder(workers)
    await mine.take([ada, bob])
    cyd.gone = True
    await mine.give_back()
    assert mine.number == 0
    assert not ada.record.has_lease()
    assert not bob.record.has_lease()
    assert ada.record.why_not(OTHER) is None
    with pytest.raises(NotLeader):
        await mine.take([ada])
    await mine.renew(workers)
    await settle()
    assert numbers(workers) == [1, 1, 0]


@pytest.mark.anyio
async def test_a_term_that_an_election_took_is_the_one_of_the_first_load(workers: list[Worker]) -> None:
    ada, bob, _ = workers
    term = Term(4, ME)
    for worker in (ada, bob):
        worker.grant(term)
    mine = holder(workers)
    now = ada.clock.now
    mine.begin(Leadership(term, {"ada:1": now, "bob:1": now}, lambda found: len(found) > 1, ada.clock), [ada, bob])
    assert mine.number == 4
    await mine.take(workers)
    assert numbers(workers) == [4, 4, 4]
    bob.gone = True
    for _ in range(10):  # its recovery decides what follows, not the election's ring
        ada.clock.now += LEASE_S
        await mine.renew(workers)
        await settle()
    assert mine.number == 4
