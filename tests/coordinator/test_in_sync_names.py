"""The sets of copies in sync that a leader has its workers store."""

from __future__ import annotations

import asyncio

import pytest

from cluster.coordinator.in_sync_names import InSyncNames
from cluster.core.errors import NotLeader, WorkerLost
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.terms import Process


class Worker:
    """A worker that stores what it is told, unless it is gone."""

    def __init__(self, address: str = "ada:1") -> None:
        self.address, self.gone = address, False
        self.told: list[InSyncSet] = []

    async def name_in_sync(self, process: Process, in_sync: InSyncSet) -> None:
        await asyncio.sleep(0)
        if self.gone:
            raise WorkerLost("the worker does not answer")
        self.told.append(in_sync)


@pytest.mark.parametrize("earlier", [NOT_NAMED, InSyncSet(6, 4, ("other", "own"))])
@pytest.mark.anyio
async def test_a_leader_whose_copy_lacks_nothing_names_itself(earlier: InSyncSet) -> None:
    worker, ring = Worker(), [Worker()]
    names = InSyncNames(Process("id", "a"), ["own"], lambda: 7, lambda: ring, lambda: earlier)
    assert not names.is_sure
    await names.join([worker])
    assert names.is_sure
    assert worker.told == [InSyncSet(7, 1, ("own",))]
    await names.name(["other"])
    await names.join([worker])
    assert ring[0].told == worker.told[1:] == [InSyncSet(7, 2, ("other",))]


@pytest.mark.anyio
async def test_a_leader_whose_copy_lacks_something_leaves_what_the_workers_know() -> None:
    worker = Worker()
    earlier = InSyncSet(6, 4, ("other",))
    names = InSyncNames(Process("id", "a"), ["own"], lambda: 7, list, lambda: earlier, lambda: [worker])
    for _ in range(2):
        names.tell_spares()
        await asyncio.sleep(0.01)
        with pytest.raises(NotLeader, match="lacks something"):
            await names.join([worker])
    assert not worker.told
    assert not names.is_sure


@pytest.mark.anyio
async def test_a_spare_is_told_once_and_again_while_it_does_not_answer() -> None:
    spares, term = [Worker("ada:1"), Worker("bob:1")], 7

    async def tell() -> None:
        names.tell_spares()
        names.tell_spares()
        await asyncio.sleep(0.01)

    names = InSyncNames(Process("id", "a"), ["own"], lambda: term, list, spares=lambda: spares)
    spares[1].gone = True
    await tell()
    spares[1].gone = False
    await tell()
    assert [spare.told for spare in spares] == [[InSyncSet(7, 1, ("own",))]] * 2
    await names.name(["own", "other"])
    await tell()
    assert [spare.told[1:] for spare in spares] == [[InSyncSet(7, 2, ("own", "other"))]] * 2
    term = 8
    await tell()
    assert [spare.told[2:] for spare in spares] == [[InSyncSet(8, 2, ("own", "other"))]] * 2
