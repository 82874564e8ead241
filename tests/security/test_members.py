"""The roster: unique names and ids, revoked certificates of removed members, and damage is not an empty list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.core.errors import Busy, ClusterDamaged, DuplicateName, InvalidOption, MemberNotFound
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import MAX_MEMBERS
from cluster.security.members import Member, Members
from cluster.security.roles import Party, Role

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    return ClusterFolder(tmp_path, "lab")


@pytest.fixture
def members(folder: ClusterFolder, clock: Clock) -> Members:
    return Members(folder, clock)


def party(number: int, role: Role = Role.WORKER, name: str = "", serial: int = 0) -> Party:
    return Party(role, f"{number:016x}", "c" * 16, name or f"mac-{number}", serial or 2**159 + number)


def names(members: Members) -> list[str]:
    return [member.name for member in members.current()]


def test_who_was_admitted_is_known_to_every_process(folder: ClusterFolder, members: Members) -> None:
    assert members.current() == ()
    for number in (1, 2):
        members.admit(party(number), 2000.0)
    other = Members(folder)
    assert names(other) == ["mac-1", "mac-2"]
    assert other.admits(party(1))
    members.remove("mac-1")
    assert names(other) == ["mac-2"], "it reads again what has changed"
    assert not other.admits(party(1))


def test_only_the_very_certificate_is_admitted(members: Members) -> None:
    members.admit(party(1), 2000.0)
    assert members.admits(party(1))
    assert not members.admits(party(1, serial=7))
    assert not members.admits(party(1, Role.ADMIN))
    assert not members.admits(party(2, serial=party(1).serial))


def test_a_name_and_an_id_belong_to_one_at_a_time(members: Members) -> None:
    members.admit(party(1), 2000.0)
    with pytest.raises(DuplicateName, match=r"member named mac-1 \(worker\).*--name.*macpipe remove mac-1"):
        members.admit(party(2, name="mac-1"), 2000.0)
    with pytest.raises(DuplicateName, match="this worker is already a member, as mac-1"):
        members.admit(party(1, name="other", serial=5), 2000.0)
    members.admit(party(1, Role.CLIENT, name="mac-1-client", serial=6), 2000.0)
    members.admit(party(1), 2000.0)
    assert names(members) == ["mac-1", "mac-1-client"]


def test_who_is_removed_is_revoked_until_its_certificates_end(members: Members, clock: Clock) -> None:
    members.admit(party(1, serial=11), 2000.0)
    members.renew(party(1, serial=12), 3000.0)
    assert members.revoked() == frozenset()
    gone = members.remove("mac-1")
    assert (gone.name, gone.removed) == ("mac-1", 1000.0)
    assert members.revoked() == {11, 12}
    clock.now = 2500.0
    assert members.revoked() == {12}
    members.admit(party(1, serial=13), 5000.0)
    assert members.revoked() == {12}, "who comes back does so with a new certificate"
    clock.now = 3500.0
    members.admit(party(2), 9000.0)
    assert [member.removed for member in members.all_members()] == [None, None], "forgotten once all has ended"
    clock.now = 6000.0
    members.admit(party(3, name="mac-1"), 9000.0)
    assert names(members) == ["mac-2", "mac-1"], "who let its certificates end may be followed"


def test_who_was_removed_gets_no_further_certificate(members: Members) -> None:
    members.admit(party(1), 2000.0)
    members.remove("mac-1")
    for nobody in (party(1, serial=5), party(2)):
        with pytest.raises(MemberNotFound, match="is not a member"):
            members.renew(nobody, 3000.0)


def test_renewals_keep_what_is_valid(members: Members, clock: Clock) -> None:
    members.admit(party(1, serial=1), 2000.0)
    for serial in range(2, 100):
        members.renew(party(1, serial=serial), 2000.0 + serial)
    (kept,) = members.current()
    assert [one.serial for one in kept.issued] == list(range(36, 100)), "the latest MAX_SERIALS"
    clock.now = 2098.5
    members.renew(party(1, serial=500), 9000.0)
    (kept,) = members.current()
    assert [one.serial for one in kept.issued] == [99, 500]


def test_who_cannot_be_removed(members: Members) -> None:
    members.admit(party(1, Role.COORDINATOR, name="mac-1-coordinator"), 2000.0)
    with pytest.raises(InvalidOption, match="cannot be removed"):
        members.remove("mac-1-coordinator")
    with pytest.raises(MemberNotFound, match=r"named ghost; `macpipe members`"):
        members.remove("ghost")


def test_the_coordinator_that_made_the_cluster_holds_its_authority(members: Members, clock: Clock) -> None:
    assert members.authority_holder() is None
    members.admit(party(1, Role.COORDINATOR, name="mac-1-coordinator"), 1500.0)
    members.admit(party(2), 3000.0)
    members.admit(party(3, Role.COORDINATOR, name="mac-3-coordinator"), 2000.0)
    assert members.first_end() == 1500.0
    clock.now = 2500.0
    assert members.first_end() == 3000.0, "an expired certificate ends no more"
    members.admit(party(4), 9000.0)
    assert names(members) == ["mac-1-coordinator", "mac-2", "mac-4"], "another coordinator's certificate expires"
    holder = members.authority_holder()
    assert holder is not None
    assert holder.name == "mac-1-coordinator"


def test_the_roster_has_a_bound(members: Members, folder: ClusterFolder) -> None:
    from cluster.security.members import Issued, _pack, _unpack
    from cluster.security.state_file import StateFile

    with StateFile(folder, folder.members, _pack, _unpack).edit() as edit:
        edit.rows = tuple(
            Member(f"{n:016x}", Role.WORKER, f"{'m' * 50}-{n}", 1.0, (Issued(n, 9e9),) * 2) for n in range(MAX_MEMBERS)
        )
    with pytest.raises(Busy, match="members, removed ones included"):
        members.admit(party(10_000), 2000.0)
    assert len(members.current()) == MAX_MEMBERS


@pytest.mark.parametrize(
    "damage",
    [b"", b"[2", b"nonsense", b'{"format": 3, "rows": []}', b'{"format": 2, "rows": [{"id": "a"}]}', b"[" * 9999],
)
def test_a_damaged_roster_is_an_error(folder: ClusterFolder, members: Members, damage: bytes) -> None:
    members.admit(party(1), 2000.0)
    folder.write(folder.members, damage)
    with pytest.raises(ClusterDamaged, match=r"members\.json is damaged"):
        members.revoked()
    with pytest.raises(ClusterDamaged):
        members.admit(party(2), 2000.0)
    assert folder.members.read_bytes() == damage, "it is not written over"


WRITER = """
import sys
from pathlib import Path
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.members import Members
from cluster.security.roles import Party, Role

members = Members(ClusterFolder(Path(sys.argv[1]), "lab"))
for n in range(5):
    number = int(sys.argv[2]) * 100 + n
    members.admit(Party(Role.WORKER, f"{number:016x}", "c" * 16, f"mac-{number}", number + 1), 9e9)
"""


def test_processes_that_write_at_once_lose_nothing(folder: ClusterFolder, members: Members) -> None:
    argv = [sys.executable, "-c", WRITER, str(folder.home)]
    writers = [subprocess.Popen([*argv, str(n)], cwd=ROOT) for n in range(2)]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert len(members.current()) == 10


def test_rosters_of_two_macs_are_merged_and_nobody_comes_back(
    folder: ClusterFolder, members: Members, clock: Clock, tmp_path: Path
) -> None:
    other_folder = ClusterFolder(tmp_path / "other", "lab")
    other = Members(other_folder, clock)
    members.admit(party(0, Role.COORDINATOR, serial=10), 9000.0)
    members.admit(party(1, serial=11), 2000.0)
    members.admit(party(2, serial=21), 2000.0)
    other.merge(folder.members.read_bytes())
    assert other.all_members() == members.all_members()
    clock.now = 1100.0
    members.remove("mac-1")
    other.renew(party(2, serial=22), 3000.0)
    other.remove("mac-2")
    other.admit(party(3, serial=31), 2000.0)
    before = folder.members.read_bytes()
    members.merge(other_folder.members.read_bytes())
    other.merge(before)
    assert members.all_members() == other.all_members()
    assert names(members) == ["mac-0", "mac-3"]
    assert members.revoked() == {11, 21, 22}
    with pytest.raises(ClusterDamaged):
        members.merge(b"{}")
