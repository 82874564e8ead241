"""A standby follows who leads, takes its place once it is lost, and gives way to it if it is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cluster.coordinator.replicated_service import ReplicatedService
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.term_holder import TermHolder
from cluster.core.errors import (
    DiskFull,
    Forbidden,
    InvalidOption,
    MacpipeError,
    MemberRemoved,
    Unauthenticated,
    Unreachable,
)
from cluster.core.leadership import (
    CoordinatorName,
    CoordinatorRole,
    LeaderClaim,
    LeadershipState,
    Replicate,
    StandbyState,
)
from cluster.core.limits import GONE_S
from cluster.core.term_limits import LEASE_S
from cluster.core.worker import WorkerInfo
from cluster.membership.in_sync import InSyncSet
from cluster.membership.terms import TermAnswer, TermCall
from cluster.platform.continuous_clock import continuous_seconds
from cluster.standby import election
from cluster.standby import standby as module
from cluster.standby.model_fit import ModelFit
from cluster.standby.other_coordinators import OtherCoordinators
from cluster.standby.standby import Standby, Succession
from standby.test_election import STANDBY, Workers

LEADER = CoordinatorName("mac-1", "a", ("mac-1:7700",))
ME = CoordinatorName("mac-2", "b", ("mac-2:7700",))
SERVICE = ReplicatedService((ModelEntry("default", LoadOrder("m")),), replicate=Replicate.SYNC)


@dataclass
class Stream:
    """A leader's stream as the test wants it."""

    heard_at: float = field(default_factory=continuous_seconds)
    leadership: LeadershipState | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    handover: str | None = None
    error: MacpipeError | None = None
    prepared: bool | None = None
    """What the standby has told its leader."""

    def tell_prepared(self, *, is_prepared: bool) -> None:
        self.prepared = is_prepared


@dataclass
class Replica:
    """A copy of the leader's state."""

    is_complete: bool = True
    content: ReplicatedService | None = SERVICE
    named: InSyncSet | None = None

    def service(self) -> ReplicatedService:
        if self.content is None:
            raise InvalidOption("there is no copy yet")
        return self.content

    def is_in_sync(self, named: InSyncSet) -> bool:
        self.named = named
        return "mine" in named.replicas


class Roster(Workers):
    """The workers, for a process of this standby."""

    closed = False

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.terms = TermHolder(STANDBY, self.clock)

    async def close(self) -> None:
        self.closed = True


class FitsAnyWorkers:
    """A model that any workers can hold."""

    problem = ""
    reader = None
    is_prepared = False

    async def prepare(self, service: ReplicatedService) -> None:
        pass

    def __call__(self, workers: Sequence[WorkerInfo]) -> bool:
        return bool(workers)


class Scene:
    """One standby, a leader that may be there, and three workers whose leases are over unless ``leased``."""

    def __init__(self, *, leased: bool = False, fits_any: bool = False) -> None:
        self.leads = True
        self.refusal: MacpipeError | None = None
        """Why the leader, which answers, is not followed."""
        self.no_leader: MacpipeError = Unreachable("nobody answers")
        """How other coordinators answer while there is no leader."""
        self.told: list[str] = []
        """What the standby has told the leader of its problem."""
        self.streams: list[Stream] = []
        self.roster = Roster("ada", "bob", "cyd")
        if not leased:
            self.roster.clock.now += LEASE_S
        self.replica = Replica()
        self.others = OtherCoordinators(ME, self._ask)
        fit: Any = FitsAnyWorkers() if fits_any else ModelFit(None)  # type: ignore[arg-type]
        create: Any = lambda service: self.roster  # noqa: E731
        self.standby = Standby(self.others, self.replica, self._open, create, fit, lambda: ["mac-1:7700"])
        self.running = asyncio.create_task(self.standby.run())

    async def _ask(self, address: str, claim: LeaderClaim) -> LeaderClaim:
        if not self.leads:
            raise self.no_leader
        self.told.append(claim.problem)
        return LeaderClaim(LEADER, CoordinatorRole.LEADER, 5, LEADER)

    @asynccontextmanager
    async def _open(self, address: str) -> AsyncIterator[Stream]:
        if self.refusal:
            raise self.refusal
        self.streams.append(Stream())
        yield self.streams[-1]

    async def elected(self) -> Succession:
        return await self.running

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


async def until(seen: Callable[[], object]) -> None:
    async with asyncio.timeout(18):
        while not seen():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(election, "HEARTBEAT_S", 2.0)  # let all workers answer, however slow this machine is


@pytest.mark.anyio
async def test_a_standby_takes_the_place_of_a_leader_that_hands_over_and_resumes_if_it_is_named() -> None:
    scene = Scene()
    scene.roster.all[1].in_sync = InSyncSet(5, 3, ("other", "mine"))
    scene.roster.all[2].newest_epoch = 77
    await until(lambda: scene.streams)
    stream = scene.streams[0]
    stream.leadership = LeadershipState(CoordinatorRole.LEADER, 5, LEADER, standbys=(StandbyState("mac-3", ("c:1",)),))
    await until(lambda: scene.standby.leadership)
    assert scene.others.leader == LEADER
    assert "c:1" in scene.others.addresses
    scene.leads = False
    stream.handover = "mac-2"
    stream.ended.set()
    taken = await scene.elected()
    assert taken.leadership.term.number == scene.roster.terms.number == 6
    assert scene.roster.terms.process == STANDBY
    assert (taken.may_resume, taken.newest_epoch, taken.service) == (True, 77, SERVICE)
    assert not scene.roster.closed


@pytest.mark.anyio
async def test_who_leads_knows_which_workers_did_not_answer_in_the_election() -> None:
    scene = Scene()
    scene.leads = False
    scene.roster.all[2].gone = True
    assert (await scene.elected()).roster.silent == {scene.roster.all[2].address}


@pytest.mark.parametrize(
    ("complete", "replicate", "named", "may_resume"),
    [
        (True, Replicate.SYNC, ("other",), False),
        (True, Replicate.ASYNC, ("other",), True),
        (False, Replicate.ASYNC, ("mine",), False),
        (False, Replicate.SYNC, ("mine",), False),
    ],
)
@pytest.mark.anyio
async def test_a_copy_that_lacks_something_resumes_nothing(
    complete: bool, replicate: Replicate, named: tuple[str, ...], may_resume: bool
) -> None:
    scene = Scene()
    scene.leads = False
    scene.replica.is_complete = complete
    scene.replica.content = replace(SERVICE, replicate=replicate)
    for worker in scene.roster.all:
        worker.in_sync = InSyncSet(5, 3, named)
    assert (await scene.elected()).may_resume is may_resume


@pytest.mark.parametrize("told", [range(3), range(1, 3), range(0)])
@pytest.mark.anyio
async def test_a_copy_that_lacks_something_leaves_the_lead_to_one_in_sync_and_leads_if_none_comes(
    told: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(fits_any=True)
    scene.leads, scene.replica.content = False, replace(SERVICE, loaded=("default",))
    for number in told:  # a worker that was told nothing may answer first
        scene.roster.all[number].in_sync = InSyncSet(5, 3, ("other",))
    await until(lambda: scene.roster.asked)
    await until(lambda: "its copy lacks part of the answers" in scene.standby.problem)
    assert not scene.running.done()
    scene.leads = True  # the one in sync is back
    await until(lambda: scene.streams)
    assert not scene.running.done()
    scene.leads = False
    scene.streams[0].handover = ""
    scene.streams[0].ended.set()
    monkeypatch.setattr(module, "IN_SYNC_WAIT_S", 0.1)
    assert not (await scene.elected()).may_resume


@pytest.mark.anyio
async def test_grants_are_given_back_once_a_later_worker_names_another_copy() -> None:
    scene = Scene(fits_any=True)
    scene.leads, scene.replica.content = False, replace(SERVICE, loaded=("default",))
    ada, bob, cyd = scene.roster.all
    ada.in_sync, bob.in_sync, cyd.gone = InSyncSet(5, 2, ("mine",)), InSyncSet(5, 3, ("other",)), True
    granted, answer = asyncio.Event(), bob.request_term

    async def answer_late(call: TermCall) -> tuple[TermAnswer, str]:
        await granted.wait()
        return await answer(call)

    bob.request_term = answer_late  # type: ignore[method-assign]
    await until(lambda: ada.record.term.number == 6)
    granted.set()
    await until(lambda: not ada.record.has_lease())
    await until(lambda: scene.standby._in_sync.replicas == ("other",))
    assert not scene.running.done()
    await scene.end()


@pytest.mark.anyio
async def test_a_leader_that_is_alive_is_followed_again_and_loses_nothing() -> None:
    scene = Scene(leased=True)
    await until(lambda: scene.streams)
    scene.streams[0].ended.set()  # the connection broke, and the leader answers as before
    await until(lambda: len(scene.streams) == 2)
    assert scene.roster.terms.number == 0
    assert scene.roster.terms_of_workers == [5, 5, 5]
    await scene.end()


@pytest.mark.anyio
async def test_an_election_ends_when_somebody_leads() -> None:
    scene = Scene(leased=True)
    scene.leads = False
    await until(lambda: scene.roster.asked)
    scene.leads = True
    await until(lambda: scene.streams)
    assert scene.roster.closed
    assert scene.roster.terms_of_workers == [5, 5, 5]
    await scene.end()


@pytest.mark.anyio
async def test_who_has_no_copy_waits_for_a_leader() -> None:
    scene = Scene()
    scene.leads, scene.replica.content = False, None
    await until(lambda: "there is no copy yet" in scene.standby.problem)
    assert not scene.roster.asked
    await scene.end()


@pytest.mark.anyio
async def test_one_that_cannot_follow_says_why_once_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "cluster.standby.standby")
    scene = Scene()
    scene.refusal = DiskFull("the disk is full")
    await until(lambda: scene.told[3:])
    assert scene.standby.problem == scene.told[-1] == "cannot follow mac-1: the disk is full"
    scene.refusal = Forbidden("this Mac was removed")
    await until(lambda: "removed" in scene.told[-1])
    scene.refusal = None
    await until(lambda: scene.streams and not scene.standby.problem)
    assert [record.message for record in caplog.records if "reason=" in record.message] == [
        "standby: not following reason=cannot follow mac-1: the disk is full",
        "standby: not following reason=cannot follow mac-1: this Mac was removed",
    ]
    assert "standby: follows again" in caplog.messages
    scene.streams[0].error = DiskFull("the disk is full again")
    scene.replica.is_complete = False
    scene.streams[0].ended.set()
    await until(lambda: "cannot follow mac-1 any more: the disk is full again" in scene.told)
    await until(lambda: len(scene.streams) == 2)
    assert scene.standby.problem, "a copy that is not complete is no end of it"
    await scene.end()


@pytest.mark.anyio
async def test_one_whose_copies_end_says_so_once_and_tries_less_and_less_often(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "cluster.standby")
    monkeypatch.setattr(module, "MAX_COPY_PAUSE_S", 0.05)
    scene = Scene()
    scene.replica.is_complete = False
    for number in range(4):
        await until(lambda: scene.streams[number:])  # noqa: B023
        scene.streams[number].error = DiskFull("the disk is full")
        scene.streams[number].ended.set()
    await until(lambda: scene.streams[4:])
    assert scene.standby._copy_pause_s == 0.05
    assert caplog.messages == [
        "leader: found leader=mac-1 term=5",
        "standby: following leader=mac-1 address=mac-1:7700",
        "standby: not following reason=cannot follow mac-1 any more: the disk is full",
    ]
    scene.replica.is_complete = True
    await until(lambda: not scene.standby.problem)
    assert caplog.messages[3:] == ["standby: follows again"]
    assert scene.standby._copy_pause_s == module.LOOK_S
    await scene.end()


@pytest.mark.anyio
@pytest.mark.parametrize("place", ["at first", "meanwhile", "by any coordinator", "by a worker"])
async def test_one_that_was_removed_from_its_cluster_ends(place: str) -> None:
    scene, removal = Scene(), MemberRemoved("mac-2 was removed from this cluster")
    if place == "at first":
        scene.refusal = removal
    else:
        await until(lambda: scene.streams)
        (stream,) = scene.streams
        if place == "meanwhile":
            stream.error = removal
        elif place == "by a worker":
            scene.leads, scene.roster.all[1].refusal = False, removal
        else:
            scene.leads, scene.no_leader = False, removal
        stream.ended.set()
    with pytest.raises(MemberRemoved, match="mac-2 was removed"):
        await scene.elected()
    assert scene.roster.asked is (place == "by a worker")
    assert scene.roster.closed is scene.roster.asked
    assert not any(worker.record.has_lease() for worker in scene.roster.all), "what was granted is given back"


@pytest.mark.anyio
@pytest.mark.parametrize("why", [Unreachable("nobody answers"), Unauthenticated("this needs a valid certificate")])
async def test_one_that_nobody_lets_in_or_answers_stays(why: MacpipeError) -> None:
    scene = Scene(leased=True)
    scene.leads, scene.no_leader = False, why
    for worker in scene.roster.all:
        worker.refusal = why
    await until(lambda: scene.roster.asked and scene.standby.problem)
    assert why.sentence in scene.standby.problem
    assert not scene.running.done()
    await scene.end()


@pytest.mark.anyio
async def test_one_that_nobody_answers_says_who_refused_it_and_why_it_is_not_elected() -> None:
    scene = Scene(leased=True)
    scene.leads = False
    await until(lambda: "cannot take its place yet: nobody answers; worker ada" in scene.standby.problem)
    scene.leads = True
    await until(lambda: scene.streams and not scene.standby.problem)
    await scene.end()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The problems that a standby has logged."""
    return [message for message in caplog.messages if message.startswith("standby: not following")]


@pytest.mark.anyio
async def test_one_that_no_worker_answers_logs_which_ones_and_each_other_reason_that_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene(fits_any=True)
    scene.leads, scene.replica.content = False, replace(SERVICE, loaded=("default",))
    for worker in scene.roster.all:
        worker.gone = True
    start = "standby: not following reason=no leader answers, and this Mac cannot take its place yet: nobody answers; "
    names = "; ".join(f"worker {name} does not answer" for name in ("ada", "bob", "cyd"))
    await until(lambda: start + names in said(caplog))
    for _ in range(3):
        scene.standby._others.problem = ""
        await until(lambda: scene.standby.problem)
    assert said(caplog).count(start + names) == 1
    assert said(caplog)[-1] == start + names
    assert not any("its copy lacks" in one for one in said(caplog)), "nobody named the copies in sync"
    scene.roster.all[0].gone, scene.roster.all[0].in_sync = False, InSyncSet(5, 3, ("other",))
    await until(lambda: "its copy lacks part of the answers" in said(caplog)[-1])
    assert not scene.running.done()
    await scene.end()


def test_problems_that_alternate_fill_no_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "continuous_seconds", lambda: now)
    standby = Standby(OtherCoordinators(ME, None), Replica(), None, None, None)  # type: ignore[arg-type]
    silent, refused = Unreachable("the call timed out"), Unreachable("the connection was refused")
    for _ in range(100):
        for problem in (silent, refused):
            now += 1
            standby._note_problem("cannot follow", problem)
            assert standby.problem == f"cannot follow: {problem.sentence}"
    assert len(said(caplog)) == 8, "each once a minute"
    now += module.SAY_AGAIN_S
    for _ in range(2):
        standby._note_problem("cannot follow", silent)
    assert len(said(caplog)) == 9


def test_the_first_one_in_sync_and_the_chosen_one_go_at_once_and_the_others_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standby = Standby(OtherCoordinators(ME, None), Replica(), None, None, None)  # type: ignore[arg-type]

    def patience(handover: str | None, *in_sync: str) -> float:
        names = ("mac-2", "mac-3")
        found = tuple(StandbyState(name, (f"{name}:7700",), in_sync=name in in_sync) for name in names)
        state = LeadershipState(CoordinatorRole.LEADER, 5, LEADER, standbys=found)
        return standby._patience_s(Stream(0.0, state, handover=handover))

    assert patience("mac-2") == patience("") == 0.0
    assert patience("mac-3") > GONE_S
    assert patience(None, "mac-2", "mac-3") == patience(None, "mac-2") == 0.0
    assert patience(None) == GONE_S
    assert patience(None, "mac-3") == GONE_S + LEASE_S
    monkeypatch.setattr(standby._others, "me", CoordinatorName("mac-3", "c", ("mac-3:7700",)))
    assert LEASE_S < GONE_S < patience(None, "mac-2", "mac-3") < GONE_S + LEASE_S


@pytest.mark.anyio
async def test_a_leader_is_told_once_its_standby_has_read_what_it_needs_to_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    scene = Scene(fits_any=True)
    await until(lambda: scene.streams and scene.streams[0].prepared is False)
    monkeypatch.setattr(FitsAnyWorkers, "is_prepared", True)
    await until(lambda: scene.streams[0].prepared)
    await scene.end()
