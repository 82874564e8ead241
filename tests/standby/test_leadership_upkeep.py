"""A leader that knows no other coordinator reads and encodes nothing, and one that is gone holds up nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.replicated_service import SERVICE_FILE, ReplicatedService
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.members import Members
from cluster.security.roles import Party, Role
from cluster.standby import leadership_upkeep as module
from cluster.standby import other_coordinators
from cluster.standby.leadership_upkeep import LeadershipUpkeep
from cluster.standby.other_coordinators import OtherCoordinators

ME = CoordinatorName("mac-1", "a", ("mac-1:7700",))
OTHER = CoordinatorName("mac-2", "b", ("mac-2:7700",))


class Roster:
    """No workers; it counts how often their leases would have been renewed."""

    number = 3
    renewals = 0

    def __init__(self, members: Members | None) -> None:
        self.trust = SimpleNamespace(members=members)

    @property
    def terms(self) -> Roster:
        return self

    def addresses(self) -> set[str]:
        return set()

    async def renew(self, workers: Sequence[object]) -> None:
        self.renewals += 1


class Scene:
    """A leader whose upkeep runs, with one file of state."""

    def __init__(self, folder: Path, members: Members | None = None) -> None:
        self.reads = self.services = 0
        self.asked = list[str]()
        self.file = folder / SERVICE_FILE
        self.served = ReplicatedService((ModelEntry("default", LoadOrder("m")),))
        self.content = b"1"
        self.roster: Any = Roster(members)
        self.others = OtherCoordinators(ME, self._ask)
        self.replicator = Replicator(None, "copy")
        files: Any = self
        self.upkeep = LeadershipUpkeep(self.others, self.roster, self.replicator, files, self._serve, self.file)

    async def _ask(self, address: str, claim: LeaderClaim) -> LeaderClaim:
        self.asked.append(address)
        return await asyncio.get_running_loop().create_future()  # its Mac is silent

    def read_changed(self) -> dict[str, bytes | None]:
        self.reads += 1
        return {"epoch": self.content}

    def _serve(self) -> ReplicatedService:
        self.services += 1
        return self.served

    def sent(self) -> dict[str, bytes | None]:
        """Return the files that a standby gets first."""
        return self.replicator._files


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not is_so():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Scene]:
    scene = Scene(folder)
    task = asyncio.create_task(scene.upkeep.run())
    try:
        yield scene
    finally:
        scene.upkeep.end()
        await task


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)


@pytest.mark.anyio
async def test_nothing_is_read_before_a_standby_comes_which_then_has_what_is_new(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await until(lambda: scene.others.term == 3)
        scene.roster.number = 4
        await until(lambda: scene.others.term == 4)
        assert (scene.reads, scene.services, scene.sent()) == (0, 0, {})
        scene.content = b"2"
        await scene.upkeep.publish()  # as a standby's call does
        assert scene.sent() == {"epoch": b"2", SERVICE_FILE: scene.served.encode()}
        assert not scene.file.exists()


@pytest.mark.anyio
async def test_a_coordinator_that_is_gone_holds_up_neither_leases_nor_what_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_coordinators, "GONE_S", 60.0)
    encoded = list[ReplicatedService]()
    encode = ReplicatedService.encode
    monkeypatch.setattr(ReplicatedService, "encode", lambda self: (encoded.append(self), encode(self))[1])
    async with running(tmp_path) as scene:
        scene.others.remember([OTHER])
        await until(lambda: scene.file.exists() and scene.services > 5)
        assert encoded == [scene.served] * 2, "for standbys, and for the next start"
        before, scene.served = scene.roster.renewals, ReplicatedService((), ("default",))
        await until(lambda: scene.file.read_bytes() == encode(scene.served) and scene.roster.renewals > before + 5)
        assert scene.sent()[SERVICE_FILE] == encode(scene.served)
    assert set(scene.asked) <= {"mac-2:7700"}


@pytest.mark.anyio
async def test_a_standby_that_begins_to_follow_a_leader_which_stops_does_not_make_it_lead_again(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await until(lambda: scene.others.role is CoordinatorRole.LEADER)
        scene.upkeep.end()
        scene.others.stand_by()
        scene.content = b"2"
        await scene.upkeep.publish()
        assert (scene.others.role, scene.others.leader) == (CoordinatorRole.STANDBY, None)
        assert scene.sent()["epoch"] == b"2"


@pytest.mark.anyio
async def test_what_is_new_is_sent_although_the_call_that_found_it_ends(tmp_path: Path) -> None:
    """Nobody finds it again: a file counts as sent once it was read."""
    scene, found, may_go_on = Scene(tmp_path), threading.Event(), threading.Event()
    new = [{"keys.json": b"revoked"}]

    def read_changed() -> dict[str, bytes | None]:
        changed: Any = new.pop() if new else {}
        found.set()
        assert may_go_on.wait(15)
        return changed

    scene.read_changed = read_changed  # type: ignore[method-assign]
    call = asyncio.create_task(scene.upkeep.publish())
    await until(found.is_set)
    call.cancel()
    await asyncio.wait((call,))
    assert call.cancelled()
    may_go_on.set()
    await scene.upkeep.publish()
    assert scene.sent()["keys.json"] == b"revoked"


@pytest.mark.anyio
async def test_who_was_removed_from_the_cluster_is_not_missed_and_others_are(tmp_path: Path) -> None:
    folder = ClusterFolder(tmp_path, "lab")
    members = Members(folder)
    for number, name in enumerate(("mac-1", "mac-2", "mac-3", "mac-4"), start=1):
        role = Role.WORKER if name == "mac-4" else Role.COORDINATOR
        members.admit(Party(role, f"{number:016x}", "c" * 16, name, 2**159 + number), 9e9)
    scene = Scene(tmp_path, members)
    for name in ("mac-2", "mac-3", "mac-4"):
        scene.others.hear(LeaderClaim(CoordinatorName(name, name, (f"{name}:7700",)), CoordinatorRole.STANDBY))

    def missed() -> list[str]:
        state = scene.upkeep.state
        assert state
        return [one.name for one in state.standbys]

    assert missed() == ["mac-2", "mac-3"], "what is called as a worker is, is no coordinator of the cluster"
    members.remove("mac-2")
    assert missed() == ["mac-3"]
    assert [one.name for one in (await scene.upkeep.confirm()).missing] == ["mac-3"]
    scene.replicator.follow(CoordinatorName("mac-3", "b", ("elsewhere:7700",)), "copy-3")
    state = scene.upkeep.state
    assert state
    assert [(one.name, one.away) for one in state.standbys] == [("mac-3", False)]
    folder.members.write_text("{")
    assert missed() == ["mac-3", "mac-2", "mac-4"], "a damaged file removes nobody"
