"""Private files and folders: closed to others whatever the umask, and never half written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.core.errors import DiskFull, InvalidOption
from cluster.platform.paths import hold_id
from cluster.platform.private_files import protect_home, replace_file
from cluster.security.cluster_folder import ClusterFolder
from disks import FailingDisk


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A usual umask, and two that are not."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_folder_on_the_way_is_closed_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    home = tmp_path / "a" / "home"
    protect_home(home)
    with hold_id(home / "workers" / "mac"):
        pass
    assert [oct(mode(p)) for p in (tmp_path / "a", *(tmp_path / "a").rglob("*")) if mode(p) & 0o077] == []


def test_an_open_home_of_an_earlier_version_is_closed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for folder in (home, home / "workers", home / ".DS_Store"):
        folder.mkdir()
        folder.chmod(0o777)
    protect_home(home)
    assert mode(home) == 0o700


def test_a_folder_of_others_is_never_changed_and_refused_where_they_can_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    tmp_path.chmod(0o755)
    protect_home(tmp_path)
    assert mode(tmp_path) == 0o755
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidOption, match=f"chmod 700 {tmp_path}"):
        protect_home(tmp_path)
    tmp_path.chmod(0o1777)  # as the system's folder for temporary files
    protect_home(tmp_path)
    assert mode(tmp_path) == 0o1777


def test_a_home_that_cannot_be_made_is_for_its_writers_to_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    protect_home(tmp_path / "file" / "home")


@pytest.mark.parametrize("fault", ["full", "half", "sync"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, failing_disk: FailingDisk, fault: str) -> None:
    path = tmp_path / "state"
    replace_file(path, b"before")
    failing_disk.room = {"full": 0, "half": 3}.get(fault)
    failing_disk.fsync_fails = fault == "sync"
    with pytest.raises(OSError, match=r"No space left|Input/output"):
        replace_file(path, b"after it")
    failing_disk.room, failing_disk.fsync_fails = None, False
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["state"]  # noqa: PTH208  # hidden ones too
    failing_disk.short = True
    replace_file(path, b"after it")
    assert path.read_bytes() == b"after it"


@pytest.mark.parametrize("room", [0, 5])
def test_an_id_that_does_not_fit_on_the_disk_is_no_id(tmp_path: Path, failing_disk: FailingDisk, room: int) -> None:
    failing_disk.room = room
    with pytest.raises(OSError, match="No space left"), hold_id(tmp_path / "w"):
        pass
    assert (tmp_path / "w" / "id").read_bytes() == b""
    failing_disk.room = None
    with hold_id(tmp_path / "w") as made:
        assert len(made) == 16
    with hold_id(tmp_path / "w") as again:
        assert again == made


def test_an_id_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "id").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), hold_id(tmp_path / "w"):
        pass
    assert (tmp_path / "victim").read_text() == ""


def test_a_full_disk_is_named_by_whoever_writes_cluster_state(tmp_path: Path, failing_disk: FailingDisk) -> None:
    folder = ClusterFolder(tmp_path, "lab")
    folder.write(folder.members, b"before")
    failing_disk.room = 2
    with pytest.raises(DiskFull, match=r"members\.json: No space left on device; free some room"):
        folder.write(folder.members, b"after")
    failing_disk.room = None
    assert folder.members.read_bytes() == b"before"
    folder.write(folder.members, b"after")
    assert folder.members.read_bytes() == b"after"
