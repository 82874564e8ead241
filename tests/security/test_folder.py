"""The cluster's folder: private, with files that are replaced atomically and edited by one at a time."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from cluster.core.errors import Busy, ClusterDamaged, DiskFull, InvalidOption
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request
from cluster.security.roles import Role


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    return ClusterFolder(tmp_path / "home", "lab")


def modes(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): stat.S_IMODE(p.lstat().st_mode) for p in (root, *root.rglob("*"))}


def test_nobody_else_may_look_inside(folder: ClusterFolder) -> None:
    old = os.umask(0)
    try:
        folder.path.mkdir(parents=True, mode=0o777)
        authority = Authority.make(folder, time.time())
        key, csr = make_request()
        certificate = authority.sign(csr, Role.WORKER, "0" * 16, "mac-1", time.time())
        folder.keep(Role.WORKER, "mac-1", key=key, certificate=certificate)
        with folder.lock():
            pass
    finally:
        os.umask(old)
    for name, mode in modes(folder.path).items():
        path = folder.path / name
        assert mode == (0o700 if path.is_dir() else 0o600), name
    assert stat.S_IMODE(folder.path.parent.stat().st_mode) == 0o700


def test_a_key_that_others_may_read_is_not_used(folder: ClusterFolder) -> None:
    authority = Authority.make(folder, time.time())
    key, csr = make_request()
    folder.keep(Role.ADMIN, "", key=key, certificate=authority.sign(csr, Role.ADMIN, "0" * 16, "ada", time.time()))
    (folder.party(Role.ADMIN) / "key.pem").chmod(0o640)
    with pytest.raises(ClusterDamaged, match="chmod 600"):
        folder.keyring(Role.ADMIN)


def test_who_asks_is_an_admin_before_a_client(folder: ClusterFolder) -> None:
    assert folder.caller() is None
    authority = Authority.make(folder, time.time())
    assert folder.caller() is None
    for role in (Role.CLIENT, Role.ADMIN):
        key, csr = make_request()
        folder.keep(role, "", key=key, certificate=authority.sign(csr, role, "0" * 16, "ada", time.time()))
        found = folder.caller()
        assert found is not None
        assert found.party.role is role


def test_a_missing_key_is_named(folder: ClusterFolder) -> None:
    authority = Authority.make(folder, time.time())
    key, csr = make_request()
    folder.keep(Role.ADMIN, "", key=key, certificate=authority.sign(csr, Role.ADMIN, "0" * 16, "ada", time.time()))
    (folder.party(Role.ADMIN) / "key.pem").unlink()
    with pytest.raises(ClusterDamaged, match=r"key\.pem is missing.*join again"):
        folder.keyring(Role.ADMIN)


@pytest.mark.parametrize("name", ["", "../lab", "a/b", ".hidden", "x" * 64, "a b"])
def test_a_name_that_is_no_name_has_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidOption, match="cannot be a cluster's name"):
        ClusterFolder(tmp_path, name)
    with pytest.raises(InvalidOption, match="cannot be a worker's name"):
        ClusterFolder(tmp_path, "lab").party(Role.WORKER, name)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = ClusterFolder(tmp_path / "file", "lab")
    with pytest.raises(InvalidOption, match="MACPIPE_HOME"):
        folder.write(folder.authority, b"")
    with pytest.raises(InvalidOption, match="MACPIPE_HOME"), folder.lock():
        pass


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write(folder.members, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="No space left"):
        folder.write(folder.members, b"new")
    assert folder.members.read_bytes() == b"old"
    assert list(folder.path.iterdir()) == [folder.members]


def test_one_at_a_time_edits(folder: ClusterFolder) -> None:
    inside = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with folder.lock():
            inside.set()
            leave.wait(5)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(5)
    with pytest.raises(Busy, match="another macpipe command"), folder.lock(wait_s=0.05):
        pass
    leave.set()
    with folder.lock(wait_s=5):
        pass
    holder.join()
