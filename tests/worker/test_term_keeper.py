"""What a worker grants, on disk and before its engines, and which calls it refuses afterwards."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.core.errors import DiskFull, InvalidOption, InvalidRequest, StaleEpoch, StaleTerm, WorkerTaken
from cluster.core.replication_limits import MAX_COPIES
from cluster.core.term_limits import LEASE_S, MAX_TERM
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.terms import Process, Term
from cluster.v1 import worker_pb2 as pb
from cluster.worker.term_file import TermFile, term_file
from cluster.worker.term_keeper import TermKeeper

ADA = {"coordinator": "ada", "instance": "a1"}
BOB = {"coordinator": "bob", "instance": "b1"}


class Slots:
    """Engines that hold a slice, or not, and whose fence takes as long as a test wants."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.loading = False
        self.fenced = asyncio.Event()
        self.fenced.set()
        self.fences = 0

    def hold(self) -> None:
        self.held = [SimpleNamespace(held=SimpleNamespace(model="llama"))]

    async def fence(self) -> None:
        self.fences += 1
        await self.fenced.wait()


class Worker:
    """A keeper with its clock, its file and its engines."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.path = folder / "workers" / "solo" / "term"
        self.file: Any = term_file(folder, "solo")
        self.slots: Any = Slots()
        self.start()

    def start(self) -> None:
        self.keeper = TermKeeper(self.file, self.slots, clock=lambda: self.now)

    async def ask(self, request: pb.TermRequest.ValueType, term: int, caller: dict[str, str]) -> pb.GrantTermResponse:
        return await self.keeper.answer(pb.GrantTermRequest(request=request, term=term, **caller))

    async def grant(self, term: int, caller: dict[str, str]) -> pb.TermDenial.ValueType:
        return (await self.ask(pb.TERM_REQUEST_GRANT, term, caller)).denial


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


@pytest.mark.anyio
async def test_a_term_is_on_disk_before_it_is_granted_and_outlives_the_worker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(worker.keeper.number), sync(file))[1])
    assert not await worker.grant(3, ADA)
    assert synced[0] == 0, "the number counts once it is synced"
    assert json.loads(worker.path.read_text()) == [3, "ada", "a1"]
    worker.start()
    assert (worker.keeper.number, worker.keeper.leader, worker.keeper.leader_process) == (3, "ada", "a1")
    worker.keeper.require(3)
    assert await worker.grant(4, BOB) == pb.TERM_DENIAL_LEASED, "it waits one whole lease"
    worker.now += LEASE_S
    assert not await worker.grant(4, BOB)
    assert await worker.grant(4, ADA) == pb.TERM_DENIAL_LEASED
    worker.now += LEASE_S
    assert await worker.grant(4, ADA) == pb.TERM_DENIAL_OLD


@pytest.mark.anyio
async def test_a_term_that_cannot_be_written_is_not_granted(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    await worker.grant(1, ADA)
    worker.slots.hold()
    worker.now += LEASE_S

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(DiskFull, match="coordinator's term"):
            await worker.grant(2, BOB)
    assert (worker.keeper.number, worker.slots.fences) == (1, 1)
    worker.keeper.require(1)
    worker.keeper.hear(Process("ada", "a1"), 1)
    assert worker.keeper.leader == "ada"


@pytest.mark.anyio
async def test_a_grant_is_answered_once_the_engines_are_fenced_and_the_old_term_is_refused_before(
    worker: Worker,
) -> None:
    await worker.grant(1, ADA)
    worker.now += LEASE_S
    worker.slots.fenced.clear()
    first, again = (asyncio.create_task(worker.grant(2, BOB)) for _ in range(2))
    while worker.keeper.number != 2:
        await asyncio.sleep(0)
    for number in (1, 2):
        with pytest.raises(StaleTerm):
            worker.keeper.require(number)
    renewed = asyncio.create_task(worker.ask(pb.TERM_REQUEST_RENEW, 2, BOB))
    first.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not renewed.done()
    worker.slots.fenced.set()
    assert not (await renewed).denial
    assert await again in (pb.TERM_DENIAL_BUSY, pb.TERM_DENIAL_UNSPECIFIED)
    worker.keeper.require(2)


@pytest.mark.anyio
async def test_heartbeats_keep_a_worker_that_is_in_use_and_no_other(worker: Worker) -> None:
    await worker.grant(1, ADA)
    for held, leader in ((True, "ada"), (False, "")):
        worker.slots.held = []
        if held:
            worker.slots.hold()
        worker.now += LEASE_S - 0.1
        worker.keeper.hear(Process("ada", "a1"), 1)
        worker.keeper.hear(Process("bob", "b1"), 1)
        worker.now += 0.2
        assert worker.keeper.leader == leader
    worker.slots.hold()
    worker.keeper.hear(Process("ada", "a1"), 1)
    assert worker.keeper.is_needed
    worker.keeper.release()
    assert worker.keeper.leader == "ada"
    worker.slots.held = []
    worker.keeper.release()
    assert (worker.keeper.leader, worker.keeper.is_needed) == ("", False)


@pytest.mark.anyio
async def test_others_are_told_whose_it_is(worker: Worker) -> None:
    await worker.grant(1, ADA)
    load = pb.LoadStageRequest(term=1, **BOB)
    with pytest.raises(WorkerTaken, match="it is kept for another coordinator; stop that one"):
        worker.keeper.refuse_others(load)
    worker.slots.hold()
    with pytest.raises(WorkerTaken, match="it serves llama for another coordinator; stop that one"):
        worker.keeper.refuse_others(load)
    answer = await worker.ask(pb.TERM_REQUEST_ASK, 0, BOB)
    assert (answer.denial, answer.term, answer.coordinator) == (pb.TERM_DENIAL_LEASED, 1, "ada")
    assert "it serves llama for another coordinator" in answer.problem
    with pytest.raises(WorkerTaken, match="another coordinator of the same id"):
        worker.keeper.refuse_others(pb.LoadStageRequest(coordinator="ada", instance="a2", term=1))
    worker.keeper.refuse_others(pb.LoadStageRequest(**ADA))
    worker.now += LEASE_S
    worker.keeper.refuse_others(load)
    with pytest.raises(StaleTerm):
        worker.keeper.require_process(pb.UnloadStageRequest(term=1, **BOB))
    worker.keeper.require_process(pb.UnloadStageRequest(term=2, **ADA))
    with pytest.raises(StaleTerm, match="the call is of term 0, but this worker has granted term 1"):
        worker.keeper.require(0)


@pytest.mark.anyio
async def test_an_epoch_number_belongs_to_one_term(worker: Worker) -> None:
    await worker.grant(1, ADA)
    worker.keeper.accept_epoch(50)
    worker.keeper.accept_epoch(40)
    await worker.grant(2, ADA)
    for epoch in (40, 50):
        with pytest.raises(StaleEpoch) as caught:
            worker.keeper.accept_epoch(epoch)
        assert caught.value.details["epoch"] == "50"
    worker.keeper.accept_epoch(51)


@pytest.mark.anyio
async def test_impossible_terms_are_refused(worker: Worker) -> None:
    for term, caller in ((1, {}), (1, {"coordinator": "a" * 65, "instance": "b"}), (MAX_TERM + 1, ADA)):
        with pytest.raises(InvalidRequest):
            await worker.grant(term, caller)
    with pytest.raises(InvalidRequest):
        await worker.ask(pb.TERM_REQUEST_UNSPECIFIED, 1, ADA)
    assert await worker.grant(0, ADA) == pb.TERM_DENIAL_OLD
    assert not worker.path.exists()


def naming(term: int, version: int, *replicas: str, **caller: str) -> pb.NameInSyncRequest:
    return pb.NameInSyncRequest(in_sync=pb.InSyncSet(term=term, version=version, replicas=replicas), **caller)


@pytest.mark.anyio
async def test_a_new_leader_reads_whose_copy_was_in_sync_also_after_a_restart_of_the_worker(worker: Worker) -> None:
    await worker.grant(1, ADA)
    await worker.keeper.name_in_sync(naming(1, 2, "r1", "r2", **ADA))
    await worker.keeper.name_in_sync(naming(1, 1, "r3", **ADA))
    worker.keeper.accept_epoch(50)
    for _ in range(2):
        answer = await worker.ask(pb.TERM_REQUEST_ASK, 0, BOB)
        assert answer.in_sync == pb.InSyncSet(term=1, version=2, replicas=["r1", "r2"])
        assert answer.newest_epoch in (50, 0)
        worker.start()
    worker.now += LEASE_S
    await worker.grant(2, BOB)
    worker.start()
    assert (await worker.ask(pb.TERM_REQUEST_RENEW, 2, BOB)).in_sync.replicas == ["r1", "r2"]
    with pytest.raises(StaleTerm):
        await worker.keeper.name_in_sync(naming(1, 3, "r1", **ADA))
    await worker.keeper.name_in_sync(naming(2, 1, "r2", **BOB))
    assert (await worker.ask(pb.TERM_REQUEST_RENEW, 2, BOB)).in_sync.replicas == ["r2"]


@pytest.mark.anyio
async def test_a_set_is_stored_even_if_its_caller_goes_and_a_grant_meanwhile_keeps_it(worker: Worker) -> None:
    await worker.grant(1, ADA)
    task = asyncio.create_task(worker.keeper.name_in_sync(naming(1, 1, "r1", **ADA)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    assert not await worker.grant(2, ADA)
    worker.start()
    answer = await worker.ask(pb.TERM_REQUEST_RENEW, 2, ADA)
    assert (answer.denial, answer.in_sync.replicas) == (pb.TERM_DENIAL_UNSPECIFIED, ["r1"])


@pytest.mark.anyio
async def test_impossible_sets_are_refused(worker: Worker) -> None:
    await worker.grant(1, ADA)
    for request in (
        naming(1, 0, "r1", **ADA),
        naming(1, 1, *("r" for _ in range(MAX_COPIES + 1)), **ADA),
        naming(1, 1, "", **ADA),
        naming(1, 1, "r" * 65, **ADA),
        naming(1, 1, "r1"),
    ):
        with pytest.raises(InvalidRequest):
            await worker.keeper.name_in_sync(request)
    assert (await worker.ask(pb.TERM_REQUEST_RENEW, 1, ADA)).in_sync.term == 0


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2, 3]", "[0, 'a', 'b']", '[1, "a"]', "[" * 5000, '[true, "a", "b"]', '[1, "a", "b", [1, 0, []]]'],
)
def test_a_damaged_file_stops_the_worker_and_says_what_to_do(tmp_path: Path, content: str) -> None:
    path = tmp_path / "term"
    path.write_text(content)
    with pytest.raises(InvalidOption, match="delete the file"):
        TermFile(path).read()
    path.unlink()
    assert TermFile(path).read() == (None, NOT_NAMED)
    for in_sync in (NOT_NAMED, InSyncSet(7, 2, ("r1", "r2"))):
        TermFile(path).write(Term(7, Process("ada", "a1")), in_sync)
        assert TermFile(path).read() == (Term(7, Process("ada", "a1")), in_sync)
