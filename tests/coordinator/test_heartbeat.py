"""The heartbeat of workers that answer, leave, hang and lie: nobody waits for a worker that is not asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import __version__
from cluster.coordinator import roster as roster_module
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.lost_workers import KnownWorker
from cluster.coordinator.roster import Roster
from cluster.coordinator.snapshot import describe_workers
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import DuplicateId, WorkerLost, WorkerRefused
from cluster.core.limits import MAX_DEPARTED
from cluster.core.worker import WorkerInfo
from cluster.discovery.sighting import Sighting
from cluster.discovery.sighting_table import SightingTable as Sightings
from cluster.membership.leadership import Leadership
from cluster.membership.suspicion import Standing
from cluster.membership.terms import Term
from cluster.security.credentials import LocalTrust


def worker_info(name: str, address: str, worker_id: str = "", instance: str = "") -> WorkerInfo:
    return WorkerInfo(
        id=worker_id or name,
        instance=instance,
        name=name,
        version=__version__,
        cluster="c",
        control_address=address,
        data_address=f"{address}9",
        chip="",
        backend="",
        mlx_version=f"0 mlx-lm {version('mlx-lm')}",
        memory_total=1,
        memory_limit=1,
    )


class Worker:
    """A control port that answers as ``name``, or as ``says`` decides."""

    def __init__(self, name: str, address: str, worker_id: str = "", instance: str = "") -> None:
        self.name, self.address, self.id, self.instance = name, address, worker_id, instance
        self.says: Callable[[], Awaitable[str]] | None = None
        self.refuses = self.closed = False
        self.holder = ""
        """The process of the coordinator with the caller's id that it is kept for."""
        self.asked = 0

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        if self.refuses:
            raise WorkerRefused(f"worker {self.name} refused", worker=self.name)
        try:
            name = await asyncio.wait_for(self.says(), timeout_s) if self.says else self.name
        except TimeoutError:
            raise WorkerLost(f"worker {self.name} does not answer", worker=self.name) from None
        await asyncio.sleep(0)
        self.asked += 1
        info = worker_info(name, self.address, self.id, self.instance)
        held = replace(info, live_owner="me", live_owner_process=self.holder)
        return held if self.holder else info, ""

    async def close(self) -> None:
        self.closed = True


class Network(Roster):
    """Workers that are announced, and withdraw that."""

    def __init__(self) -> None:
        self.sightings = Sightings()
        super().__init__(self.sightings, "c", "me", LocalTrust())
        self.workers: dict[str, Worker] = {}

    def start(self, name: str, address: str, worker_id: str = "", instance: str = "") -> Worker:
        worker = self.workers[address] = Worker(name, address, worker_id, instance)
        self.sightings.put(address, Sighting(address, cluster="c"))
        return worker

    def leave(self, address: str) -> None:
        self.sightings.forget(address)

    def control(self, address: str) -> WorkerClient:
        return self._controls.setdefault(address, cast(WorkerClient, self.workers[address]))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """Shorten heartbeats to a tenth."""
    for name, seconds in (("HEARTBEAT_S", 0.05), ("LOOK_S", 0.01), ("GONE_S", 0.25), ("STATUS_ASK_S", 0.1)):
        monkeypatch.setattr(f"cluster.coordinator.heartbeat.{name}", seconds)
    monkeypatch.setattr("cluster.coordinator.worker_table.RESTART_S", 0.1)
    return Network()


def watched(network: Network, play: Callable[[HeartbeatMonitor], Awaitable[None]]) -> None:
    async def run() -> None:
        watch = HeartbeatMonitor(network, lambda belief: None, tuple)
        watch.start()
        try:
            async with asyncio.timeout(15):
                await play(watch)
        finally:
            await watch.close()

    asyncio.run(run())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def names(watch: HeartbeatMonitor) -> list[str]:
    return [m.info.name for m in watch.members()]


def test_nobody_waits_for_a_worker_that_left(network: Network) -> None:
    """Its heartbeat ended with its announcement: no answer and no silence of it would end a wait."""

    async def play(watch: HeartbeatMonitor) -> None:
        network.start("ada", "a:1")
        network.start("bob", "b:1")
        await until(lambda: names(watch) == ["ada", "bob"])
        waiting = asyncio.create_task(watch.ask(("ada", "bob"), time.monotonic() + 1e6, 1e6))
        network.leave("a:1")
        network.leave("b:1")
        await waiting
        await watch.ask(("ada", "bob"), time.monotonic() + 1e6, 1e6)
        ada, bob = watch.members()
        assert (ada.reachable, bob.reachable) == (False, False)
        assert "ada has left" in ada.problem
        await until(lambda: all(w.closed for w in network.workers.values()))

    watched(network, play)


def test_a_worker_that_left_comes_back_at_another_address(network: Network) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        network.start("ada", "a:1")
        await until(lambda: names(watch) == ["ada"])
        network.leave("a:1")
        network.start("ada", "a:2")
        await until(lambda: watch.members()[0].info.control_address == "a:2")
        assert not watch.members()[0].problem
        assert not watch.duplicates()

    watched(network, play)


def test_a_status_does_not_wait_for_a_worker_that_hangs(network: Network) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        ada = network.start("ada", "a:1")
        network.start("bob", "b:1")
        await until(lambda: names(watch) == ["ada", "bob"])
        ada.says = lambda: asyncio.sleep(3600, "ada")
        async with asyncio.timeout(0.2):
            await watch.wait_for_answers()

    watched(network, play)


def test_a_recovery_waits_until_a_silent_worker_counts_as_gone(network: Network) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        watch._suspicion = type(watch._suspicion)(suspect_s=0.12, gone_s=0.25)
        ada = network.start("ada", "a:1")
        await until(lambda: names(watch) == ["ada"])
        ada.says = lambda: asyncio.sleep(3600, "ada")
        (member,) = await watch.ask(("ada",), time.monotonic(), 1e6)
        assert watch.is_gone("ada")
        assert not member.reachable

    watched(network, play)


def test_a_worker_with_a_new_name_at_each_heartbeat_fills_nothing_and_delays_nobody(network: Network) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        answers = 0

        async def renamed() -> str:
            nonlocal answers
            answers += 1
            return f"evil{answers}"

        network.start("ada", "a:1")
        network.start("evil", "e:1").says = renamed
        await until(lambda: len(names(watch)) > 1)
        while answers < 100:
            await watch.ask(names(watch), time.monotonic(), 1e6)
        await until(lambda: len(names(watch)) <= MAX_DEPARTED + 2)
        assert len(watch.beliefs()) <= MAX_DEPARTED + 2
        living = [m.info.name for m in watch.members() if m.reachable]
        assert living[0] == "ada"
        assert len(living) == 2

    watched(network, play)


def test_a_worker_that_claims_the_name_of_a_living_one_changes_nothing(network: Network) -> None:
    """Neither its answers nor its end count for the other, and both addresses are named."""

    async def play(watch: HeartbeatMonitor) -> None:
        ada = network.start("ada", "a:1", "1")
        await until(lambda: names(watch) == ["ada"])
        other = network.start("ada", "b:1", "2")
        await until(lambda: len(watch.duplicates()) == 1)
        (duplicate,) = watch.duplicates()
        assert "a:1 and b:1" in duplicate.problem
        other.refuses = True
        await until(lambda: not watch.duplicates())
        (member,) = watch.members()
        assert (member.info.control_address, member.problem) == ("a:1", "")
        belief = watch.belief("ada")
        assert belief
        assert (belief.standing, belief.losses) == (Standing.UP, 0)
        other.refuses, ada.refuses = False, True
        await until(lambda: watch.members()[0].info.control_address == "b:1")

    watched(network, play)


@pytest.mark.parametrize("name", ["ada", "bob"])
def test_a_worker_whose_state_folder_was_copied_is_named(network: Network, name: str) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        network.start("ada", "a:1", "1", "x")
        await until(lambda: names(watch) == ["ada"])
        network.start(name, "b:1", "1", "y")
        await until(lambda: len(watch.duplicates()) == 1)
        (duplicate,) = watch.duplicates()
        assert f"two workers have the id 1, ada at a:1 and {name} at b:1: the state folder" in duplicate.problem
        assert [(m.info.name, m.problem) for m in watch.members()] == [("ada", "")]
        await network.refresh()
        assert [(m.info.control_address, m.duplicate) for m in network.members] == [("a:1", True), ("b:1", True)]
        assert all("the state folder of one was copied" in m.problem for m in network.members)
        with pytest.raises(DuplicateId, match="two workers have the id 1"):
            await network.present(1)
        network.start("cyd", "c:1", "2", "z")
        assert [w.name for w in await network.present(1)] == ["cyd"]

    watched(network, play)


def test_who_is_too_small_is_not_counted_among_the_workers_that_a_load_waits_for(network: Network) -> None:
    reported: list[list[str]] = []
    reporter = SimpleNamespace(waiting=lambda found, wanted: reported.append([w.name for w in found]))

    async def gather(wait_s: float) -> list[str]:
        found = await network.gather(2, wait_s, cast(Any, reporter), lambda worker: worker.name != "tiny")
        return [worker.name for worker in found]

    async def play() -> None:
        network.start("tiny", "t:1")
        network.start("ada", "a:1")
        assert await gather(0.05) == ["ada", "tiny"], "nobody else came: the plan says what is missing"
        reported.clear()
        waiting = asyncio.create_task(gather(15))
        await until(lambda: reported == [["ada", "tiny"]])
        network.start("bob", "b:1")
        assert await waiting == ["ada", "bob", "tiny"]

    asyncio.run(asyncio.wait_for(play(), 15))


@pytest.mark.parametrize("ends", [True, False])
def test_a_worker_that_restarts_is_kept_for_the_process_before_for_a_while(
    network: Network, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long this coordinator has waited for it: only a process that goes on is another one with this id."""
    now = [1.0]
    monkeypatch.setattr(roster_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(roster_module, "SETTLE_S", 0.01)
    reporter = cast(Any, SimpleNamespace(waiting=lambda found, wanted: None))

    async def play() -> None:
        network.start("ada", "a:1")
        waiting = asyncio.create_task(network.gather(2, 15, reporter))
        await until(lambda: bool(network.members))
        now[0] += 60
        bob = network.start("bob", "b:1")
        bob.holder = "before"
        await until(lambda: bob.asked >= 3 or waiting.done())
        bob.holder = "" if ends else bob.holder
        now[0] += 60
        if ends:
            assert [worker.name for worker in await waiting] == ["ada", "bob"]
        else:
            with pytest.raises(DuplicateId, match="bob"):
                await waiting

    asyncio.run(asyncio.wait_for(play(), 15))


def test_a_worker_with_two_addresses_is_one(network: Network) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        first = network.start("ada", "a:1", "1", "x")
        network.start("ada", "b:1", "1", "x")
        await until(lambda: len(names(watch)) == 1)
        for _ in range(5):
            await watch.ask(("ada",), time.monotonic())
        assert not watch.duplicates()
        assert [w.name for w in await network.present(1)] == ["ada"]
        at = watch.members()[0].info.control_address
        first.refuses = True
        await until(lambda: watch.members()[0].info.control_address == "b:1")
        assert at in ("a:1", "b:1")
        assert not watch.members()[0].problem

    watched(network, play)


def test_a_worker_that_is_started_again_elsewhere_is_no_duplicate(network: Network) -> None:
    async def play(watch: HeartbeatMonitor) -> None:
        before = network.start("ada", "a:1", "1", "x")
        await until(lambda: names(watch) == ["ada"])
        before.refuses = True
        network.start("ada", "b:1", "1", "y")
        await until(lambda: watch.members()[0].info.control_address == "b:1")
        await watch.ask(("ada",), time.monotonic())
        assert not watch.duplicates()

    watched(network, play)


@pytest.mark.parametrize(("instance", "served"), [("", True), ("mine", True), ("other", False)])
def test_a_coordinator_with_the_id_of_this_one_is_told_from_a_life_before(
    network: Network, instance: str, served: bool
) -> None:
    held = replace(
        worker_info("ada", "a:1"),
        live_owner="me",
        live_owner_process=network.instance if instance == "mine" else instance,
    )
    problem = network.why_unusable(held)
    assert (problem == "") is served
    assert served or "another coordinator that has the id of this one" in problem


def test_a_worker_of_the_leader_before_is_no_sign_of_a_copied_state_folder(network: Network) -> None:
    leading = Leadership(Term(6, network.terms.process), {}, lambda workers: True, lambda: 0.0)
    network.terms.begin(leading, [])
    held = replace(worker_info("ada", "a:1"), live_owner="me", live_owner_process="other", term=4, model="faq")
    assert "was copied" in network.why_unusable(held), "a process that was not elected has no leader before it"
    network.inherited_epoch = 3
    assert network.why_unusable(held) == "ada still serves faq for the leader before this one (term 4)"
    assert network.why_unusable(replace(held, model="")).startswith("ada is still kept for the leader before")
    assert "was copied" in network.why_unusable(replace(held, term=7)), "it does not lead by a lower term"


def test_a_worker_that_was_lost_with_the_leader_before_is_gone_until_it_is_back(network: Network) -> None:
    network.start("bob", "b:1")
    ada = network.start("ada", "a:1", "1")
    ada.refuses = True
    network.silent = {"a:1"}
    network.miss([KnownWorker("1", "ada", "a:1")])

    async def play(watch: HeartbeatMonitor) -> None:
        def shown() -> list[tuple[str, str, bool]]:
            found = describe_workers(watch.members(), watch.beliefs())
            return [(one.name, one.standing, one.reachable) for one in found]

        await until(lambda: shown() == [("ada", "gone", False), ("bob", "up", True)])
        lost = describe_workers(watch.members(), watch.beliefs())[0]
        assert lost.problem == "worker ada has not answered since this coordinator leads"
        assert lost.silent_seconds > 0
        assert not watch.is_gone("ada"), "nobody lost it here"
        await watch.ask(("ada",), time.monotonic() + 1e6, 1e6)  # nobody waits for it
        ada.refuses = False
        await until(lambda: shown() == [("ada", "up", True), ("bob", "up", True)])

    watched(network, play)
