"""The real replicator and gate by simulated time, with standbys, workers and a disk that fail at random.

At every moment, each copy that some worker names, and that its Mac believes to be whole, has the record of each event
that a client has seen. And once nothing fails any more, every event arrives, in order.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.event_gate import EventGate
from cluster.coordinator.follower import Follower
from cluster.coordinator.in_sync_names import InSyncNames
from cluster.coordinator.replicator import Replicator
from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.leadership import CoordinatorName, Replicate
from cluster.core.request import TokenEvent
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.terms import Process
from faults.simulated_time import run_simulated, simulated_now

OWN = "own"
FAULTS_S = 20.0
QUIET_S, END_S = 35.0, 40.0
"""By then everything has long been well again, and the last events have left."""


class SimWorker:
    """A worker of the ring. While it is gone, calls fail, or are done without an answer."""

    def __init__(self, rng: random.Random) -> None:
        self.gone, self.named, self._rng = False, NOT_NAMED, rng

    async def name_in_sync(self, process: Process, in_sync: InSyncSet) -> None:
        await asyncio.sleep(self._rng.uniform(0.001, 0.1))
        if not self.gone or self._rng.random() < 0.3:
            self.named = max(self.named, in_sync)
        if self.gone:
            raise WorkerLost("worker ada does not answer", worker="ada")


class SimJournal:
    """The journal's thread as a task: batches are numbered when they come, and written a while later."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.queued = 0
        self.gate = EventGate(lambda: self.queued)
        self.problem = ""
        self._batches: list[int | Callable[[bytes], None]] = []

    def record(self, token: int) -> None:
        self.queued += 1
        self._batches.append(token)

    def copy(self, take: Callable[[bytes], None]) -> bool:
        self.queued += 1
        self._batches.append(take)
        return True

    async def run(self) -> None:
        applied, live = 0, list[int]()
        while True:
            await asyncio.sleep(self._world.rng.choice((0.001, 0.005, 0.05)))
            batches, self._batches = self._batches, []
            for batch in batches:
                applied += 1
                if isinstance(batch, int):
                    live.append(batch)
                    self._world.replicator.append(bytes([batch]))
                else:
                    batch(bytes(live))
            if not self.problem:
                self._world.copies[OWN] = set(live)
            self._world.replicator.written(applied, self.problem)


class SimStandby:
    """A standby's Mac: it stores what comes, as fast as it can, and comes back after it was lost."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self.name = world, name
        self.slow, self._task = False, asyncio.create_task(self._run())
        self._connected: asyncio.Task[None] | None = None

    def lose(self) -> None:
        if self._connected:
            self._connected.cancel()

    async def _run(self) -> None:
        while True:
            with suppress(MacpipeError):
                follower = self._world.replicator.follow(CoordinatorName(self.name, "1"), self.name)
                self._connected = asyncio.create_task(self._follow(follower))
                with suppress(MacpipeError):
                    await asyncio.gather(self._connected, return_exceptions=True)
                self._world.replicator.leave(follower)
            await asyncio.sleep(self._world.rng.uniform(0.05, 1.0))

    async def _follow(self, follower: Follower) -> None:
        self._world.whole.discard(self.name)
        fresh = set[int]()
        async for update in follower.updates():
            await asyncio.sleep(self._world.rng.uniform(1.0, 4.0) if self.slow else 0.002)
            match update.WhichOneof("update"):
                case "journal":
                    fresh = set(update.journal.content)
                    self._world.copies[self.name] = fresh
                case "records":
                    fresh |= set(update.records)
                case "complete":
                    self._world.whole.add(self.name)
            if self._world.rng.random() < 0.9 or not self.slow:
                self._world.replicator.acknowledge(follower, update.number)


class Reader:
    """The client: checks each time what all copies have."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.seen = list[int]()

    def receive(self, events: Iterable[Any]) -> None:
        self.seen += [event.token for event in events]
        self._world.check()


class World:
    """One game: a leader with three standbys and two workers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.workers = [SimWorker(self.rng) for _ in range(2)]
        names = InSyncNames(Process("id", "1"), [OWN], lambda: 1, lambda: self.workers)
        self.replicator = Replicator(Replicate.SYNC, OWN, names, clock=simulated_now)
        self.journal = SimJournal(self)
        journal: Any = self.journal
        self.replicator.attach(journal)
        self.copies: dict[str, set[int]] = {OWN: set()}
        self.whole = {OWN}
        self.reader = Reader(self)
        self.standbys = [SimStandby(self, name) for name in "abc"]
        self.names, self.began = names, 0.0

    def check(self) -> None:
        for worker in self.workers:
            for copy in set(worker.named.replicas) & self.whole:
                assert self.copies[copy].issuperset(self.reader.seen), f"{copy} is named and lacks what was seen"

    async def play(self) -> None:
        await self.names.join(self.workers)
        self.began = simulated_now()
        tasks = [asyncio.create_task(task) for task in (self.journal.run(), self.replicator.run(), self._fail())]
        loop, token = asyncio.get_running_loop(), 0
        while simulated_now() < self.began + END_S:
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))
            self.check()
            if token < 250 and simulated_now() < self.began + QUIET_S:
                self.journal.record(token)
                event: Any = TokenEvent(token, token, "")
                self.journal.gate.deliver(loop, {self.reader: [event]})
                token += 1
        assert self.reader.seen == list(range(token))
        assert self.replicator.in_sync == {OWN, *"abc"}
        assert all(set(worker.named.replicas) == self.replicator.in_sync for worker in self.workers)
        for task in tasks:
            assert not task.done() or not task.exception()
            task.cancel()

    async def _fail(self) -> None:
        """Break something again and again, each for a while."""
        while simulated_now() < self.began + FAULTS_S:
            await asyncio.sleep(self.rng.expovariate(1.5))
            self._break()
        for worker in self.workers:
            worker.gone = False
        for standby in self.standbys:
            standby.slow = False
        self.journal.problem = ""
        await asyncio.sleep(END_S)

    def _break(self) -> None:
        what: SimpleNamespace | SimWorker | SimStandby | SimJournal
        match self.rng.randrange(5):
            case 0:
                what = self.rng.choice(self.workers)
                what.gone = self.rng.random() < 0.5
            case 1 | 2:
                self.rng.choice(self.standbys).lose()
            case 3:
                standby = self.rng.choice(self.standbys)
                standby.slow = not standby.slow
            case _:
                self.journal.problem = "" if self.journal.problem else "its disk is full"


def run(seed: int) -> None:
    async def play() -> None:
        await World(seed).play()

    run_simulated(play())


@pytest.mark.parametrize("seed", [9, 153])  # each of them found a defect
def test_no_copy_that_is_named_lacks_what_a_client_saw(seed: int) -> None:
    run(seed)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_no_copy_that_is_named_lacks_what_a_client_saw_in_many_games(first: int) -> None:
    for seed in range(first, first + 100):
        run(seed)
