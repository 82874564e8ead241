"""Shared state files: files of earlier versions are read, and replaced with JSON by the first edit."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from cluster.core.errors import ClusterDamaged
from cluster.security import state_file
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.keys import ApiKey, KeyLimits, KeyScope, KeyStore
from cluster.security.limits import MAX_REVOKED
from cluster.security.members import Issued, Member, Members
from cluster.security.revocations import Revocations
from cluster.security.roles import Party, Role
from cluster.security.tokens import IssuedToken, TokenStore

OLD_MEMBERS = [
    ["c" * 16, "coordinator", "mac-1-coordinator", 1000.0, [["2f", 9e9]], None],
    ["a" * 16, "worker", "mac-2", 1001.5, [["1f" * 20, 9e9], ["20", 9.5e9]], 1002.25],
]
MEMBERS = (
    Member("c" * 16, Role.COORDINATOR, "mac-1-coordinator", 1000.0, (Issued(0x2F, 9e9),)),
    Member("a" * 16, Role.WORKER, "mac-2", 1001.5, (Issued(int("1f" * 20, 16), 9e9), Issued(0x20, 9.5e9)), 1002.25),
)
OLD_TOKENS = [
    ["0a1b2c3d", "worker", b"\x01" * 32, 9e8, 9e9, None, None, "", b"", b""],
    ["0a1b2c3e", "admin", b"\x02" * 32, 9e8, 9e9, 9.1e8, 9.05e8, "mac-3", b"\xff" * 32, b"-----BEGIN\n"],
]
TOKENS = (
    IssuedToken("0a1b2c3d", Role.WORKER, b"\x01" * 32, 9e8, 9e9),
    IssuedToken("0a1b2c3e", Role.ADMIN, b"\x02" * 32, 9e8, 9e9, 9.1e8, 9.05e8, "mac-3", b"\xff" * 32, b"-----BEGIN\n"),
)
OLD_KEYS = [
    ["0" * 12, "amy", "inference", [None, 9000, 2], 1000.0, b"\x03" * 32, None],
    ["1" * 12, "bob", "admin", [None, None, None], 1000.0, b"\x04" * 32, 2000.0],
]
KEYS = (
    ApiKey("0" * 12, "amy", KeyScope.INFERENCE, KeyLimits(None, 9000, 2), 1000.0, b"\x03" * 32),
    ApiKey("1" * 12, "bob", KeyScope.ADMIN, KeyLimits(), 1000.0, b"\x04" * 32, 2000.0),
)


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    return ClusterFolder(tmp_path, "lab")


def write_old(folder: ClusterFolder, path: Path, rows: list[Any]) -> Path:
    old = path.with_suffix(".msgpack")
    folder.write(old, msgpack.packb([1, rows]))
    return old


def assert_replaced(path: Path, old: Path) -> None:
    assert not old.exists()
    assert json.loads(path.read_bytes())["format"] == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_roster_of_an_earlier_version_is_read_and_replaced(folder: ClusterFolder) -> None:
    old = write_old(folder, folder.members, OLD_MEMBERS)
    before = Members(folder, lambda: 5000.0)
    assert before.all_members() == MEMBERS
    assert before.revoked() == {int("1f" * 20, 16), 0x20}
    Members(folder, lambda: 5000.0).admit(Party(Role.CLIENT, "b" * 16, "c" * 16, "mac-4", 3), 9e9)
    assert_replaced(folder.members, old)
    for roster in (before, Members(folder)):
        assert [member.name for member in roster.all_members()] == ["mac-1-coordinator", "mac-2", "mac-4"]
        assert roster.all_members()[:2] == MEMBERS


def test_tokens_of_an_earlier_version_are_read_and_replaced(folder: ClusterFolder) -> None:
    old = write_old(folder, folder.tokens, OLD_TOKENS)
    tokens = TokenStore(folder, lambda: 1e9)
    assert tokens.all_tokens() == TOKENS
    revoked = tokens.revoke("0a1b2c3d")
    assert_replaced(folder.tokens, old)
    assert TokenStore(folder).all_tokens() == (revoked, TOKENS[1])


def test_keys_of_an_earlier_version_are_read_and_replaced(folder: ClusterFolder) -> None:
    old = write_old(folder, folder.keys, OLD_KEYS)
    keys = KeyStore(folder, lambda: 3000.0)
    assert keys.all_keys() == KEYS
    made, text = keys.create("carl")
    assert_replaced(folder.keys, old)
    assert KeyStore(folder).all_keys() == (*KEYS, made)
    assert KeyStore(folder).find(text) == made


def test_revocations_of_an_earlier_version_are_read_and_replaced(folder: ClusterFolder) -> None:
    path = folder.revoked("mac-2")
    old = write_old(folder, path, [["1f" * 20], ["20"]])
    revocations = Revocations(folder, "mac-2")
    assert revocations.known() == {int("1f" * 20, 16), 0x20}
    revocations.learn([0x20, 0x21])
    assert_replaced(path, old)
    assert Revocations(folder, "mac-2").known() == {int("1f" * 20, 16), 0x20, 0x21}


def test_what_was_revoked_stays_revoked_whichever_coordinator_tells(folder: ClusterFolder) -> None:
    revocations = Revocations(folder, "mac-2")
    revocations.learn([1, 2])
    revocations.learn([2])
    revocations.learn([])
    assert Revocations(folder, "mac-2").known() == {1, 2}
    revocations.learn(range(10, 10 + MAX_REVOKED))
    assert Revocations(folder, "mac-2").known() == set(range(10, 10 + MAX_REVOKED))
    version = file_version(folder.revoked("mac-2"))
    revocations.learn(range(10, 20))
    assert file_version(folder.revoked("mac-2")) == version


@pytest.mark.parametrize("damage", [b"", b"\x92\x01", b"nonsense", b"\x92\x02\x90", b"\x92\x01\x91\x93a"])
def test_a_damaged_file_of_an_earlier_version_is_an_error(folder: ClusterFolder, damage: bytes) -> None:
    old = folder.members.with_suffix(".msgpack")
    folder.write(old, damage)
    with pytest.raises(ClusterDamaged, match=r"members\.msgpack is damaged"):
        Members(folder).all_members()
    with pytest.raises(ClusterDamaged):
        Members(folder).remove("mac-2")
    assert old.read_bytes() == damage, "it is not written over"


@pytest.mark.parametrize("call", [1, 2])
def test_a_file_that_is_replaced_while_it_is_looked_for_is_found(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """An edit by another process puts JSON in place of the old file between any two looks of a reader."""
    old = write_old(folder, folder.members, OLD_MEMBERS)
    calls = 0

    def replaced_after(path: Path) -> Stamp:
        nonlocal calls
        calls += 1
        try:
            return file_version(path)
        finally:
            if calls == call:
                replace_with_json(folder)

    monkeypatch.setattr(state_file, "file_version", replaced_after)
    assert Members(folder).all_members() == MEMBERS
    assert not old.exists()


def replace_with_json(folder: ClusterFolder) -> None:
    rows = [dict(zip(("id", "role", "name", "since", "issued", "removed"), row, strict=True)) for row in OLD_MEMBERS]
    folder.write(folder.members, json.dumps({"format": 2, "rows": rows}).encode())
    folder.members.with_suffix(".msgpack").unlink()


@pytest.mark.parametrize(
    ("path", "rows", "read"),
    [
        ("members", MEMBERS, lambda folder: Members(folder).all_members()),
        ("tokens", TOKENS, lambda folder: TokenStore(folder).all_tokens()),
        ("keys", KEYS, lambda folder: KeyStore(folder).all_keys()),
    ],
)
def test_json_in_the_place_of_an_older_file_is_what_counts(
    folder: ClusterFolder, path: str, rows: tuple[Any, ...], read: Callable[[ClusterFolder], tuple[Any, ...]]
) -> None:
    file: Path = getattr(folder, path)
    write_old(folder, file, [])
    old_rows = {"members": OLD_MEMBERS, "tokens": OLD_TOKENS, "keys": OLD_KEYS}[path]
    assert read(folder) == ()
    write_old(folder, file, old_rows)
    assert read(folder) == rows
    folder.write(file, b'{"format": 2, "rows": []}')
    assert read(folder) == ()
