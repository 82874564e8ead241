"""The files of prefixes: what is found after a restart, what goes first, and what is never touched."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster.core.errors import DiskFull, InvalidOption, PrefixMissing
from cluster.core.prefix_keys import node_ids, owner_key
from cluster.worker import prefix_files
from cluster.worker.prefix_files import ROOT, Node, Place, PrefixFiles, prepare_folder
from disks import FailingDisk

OWNER, OTHER, OPEN = owner_key("key:0123456789ab"), owner_key("admin.0123456789abcdef"), owner_key("http:127.0.0.1")
EDITION = "0" * 32
PLACE = Place(OWNER, EDITION)
TOKENS = tuple(range(100))
NODE_BYTES = 8192


def opened(folder: Path, limit: int = 2**20) -> PrefixFiles:
    files = PrefixFiles(folder, limit)
    files.keep_owners([OWNER, OTHER], anonymous=True)
    return files


def add(files: PrefixFiles, place: Place, start: int, end: int, size: int = 1000) -> Node:
    """Add a node and one file of it."""
    names = dict(node_ids(place.edition, place.owner, "", TOKENS, {start, end} - {0}))
    node = files.add_node(place, names[end], names.get(start, ROOT), start, TOKENS[start:end])
    assert node
    assert files.write(node, "0", {}, [memoryview(bytes(size))], rows=True)
    return node


def test_the_owners_have_names_by_kind() -> None:
    assert [name.split("-")[0] for name in (OWNER, OTHER, OPEN)] == ["key", "member", "open"]
    assert owner_key("key:0123456789ab") != owner_key("key:0123456789ac")


def test_the_index_is_that_of_the_files_after_a_restart(tmp_path: Path) -> None:
    files = opened(tmp_path)
    first, second = add(files, PLACE, 0, 10), add(files, PLACE, 10, 30)
    files.touch(files.path(PLACE, second.id))
    again = opened(tmp_path)
    assert again.nbytes == files.nbytes == 2 * NODE_BYTES + sum(first.files.values()) + sum(second.files.values())
    assert [node.id for node in again.path(PLACE, second.id)] == [first.id, second.id]
    assert again.startable(EDITION, ["0"]) == [(10, first.id), (30, second.id)]
    assert again.startable(EDITION, ["0", "1"]) == again.startable("f" * 32, ["0"]) == []
    assert again.read_tokens(second) == (10, TOKENS[10:30])


def test_rows_are_needed_all_along_the_path_and_a_state_at_its_end(tmp_path: Path) -> None:
    files = opened(tmp_path)
    add(files, PLACE, 0, 10)
    second = add(files, PLACE, 10, 30)
    assert files.write(second, "1", {}, [memoryview(b"state")], rows=False)
    assert files.startable(EDITION, ["0", "1"]) == [(30, second.id)]
    files.delete(files.path(PLACE, second.id)[0])
    assert files.startable(EDITION, ["0", "1"]) == []
    assert files.startable(EDITION, ["1"]) == [(30, second.id)]
    with pytest.raises(PrefixMissing):
        files.path(PLACE, second.id)


def test_the_least_recently_used_goes_first_and_the_beginning_last(tmp_path: Path) -> None:
    files = opened(tmp_path, limit=4 * (NODE_BYTES + 1300))
    add(files, PLACE, 0, 10)
    second = add(files, PLACE, 10, 30)
    other = add(files, Place(OTHER, EDITION), 0, 20)
    files.touch(files.path(PLACE, second.id))
    add(files, PLACE, 0, 50)
    add(files, PLACE, 0, 60)
    assert files.node(other.place, other.id) is None
    assert files.node(PLACE, second.id)
    add(files, PLACE, 0, 70)
    assert files.node(PLACE, second.id) is None
    assert files.evictions == 2
    assert files.nbytes <= files.limit
    assert opened(tmp_path).nbytes == files.nbytes


def test_what_is_larger_than_the_limit_evicts_nothing(tmp_path: Path) -> None:
    files = opened(tmp_path, limit=2 * NODE_BYTES + 2000)
    first = add(files, PLACE, 0, 10, 10)
    assert not files.write(first, "1", {}, [memoryview(bytes(20_000))], rows=True)
    assert files.node(PLACE, first.id)
    assert files.evictions == 0


def test_a_prefix_that_is_too_long_takes_others_room_but_not_its_own_beginnings(tmp_path: Path) -> None:
    files = opened(tmp_path, limit=3 * (NODE_BYTES + 1300))
    other = add(files, Place(OTHER, EDITION), 0, 20)
    path = [add(files, PLACE, at, at + 10) for at in (0, 10, 20)]
    assert files.node(other.place, other.id) is None
    names = dict(node_ids(EDITION, OWNER, "", TOKENS, [40]))
    assert files.add_node(PLACE, names[40], path[-1].id, 30, TOKENS[30:40]) is None
    assert files.path(PLACE, path[-1].id) == path
    assert opened(tmp_path).startable(EDITION, ["0"]) == [(node.end, node.id) for node in path]


@pytest.mark.parametrize("restarted", [False, True])
def test_an_unused_prefix_goes_from_its_end(tmp_path: Path, restarted: bool) -> None:
    files = opened(tmp_path, limit=4 * (NODE_BYTES + 1300))
    path = [add(files, PLACE, at, at + 10) for at in (0, 10, 20)]
    files = opened(tmp_path, files.limit) if restarted else files
    add(files, Place(OTHER, EDITION), 0, 10)
    add(files, Place(OTHER, EDITION), 0, 20)
    assert [files.node(PLACE, node.id) is not None for node in path] == [True, True, False]


def test_what_cannot_be_deleted_is_used_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = opened(tmp_path)
    node = add(files, PLACE, 0, 10)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(prefix_files, "_remove", refuse)
    files.delete(node)
    assert files.startable(EDITION, ["0"]) == []
    assert files.nbytes == 0


def test_the_free_space_of_the_disk_bounds_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = opened(tmp_path)
    add(files, PLACE, 0, 10)
    monkeypatch.setattr(prefix_files, "free_bytes", lambda _: prefix_files.DISK_MARGIN_BYTES - 2 * NODE_BYTES)
    assert files.add_node(PLACE, b"x" * 16, ROOT, 0, TOKENS) is None
    assert files.nbytes == 0


@pytest.mark.parametrize(("owners", "anonymous", "left"), [((OWNER,), False, 1), ((), True, 1), ((), False, 0)])
def test_only_the_files_of_known_owners_stay(
    tmp_path: Path, owners: tuple[str, ...], anonymous: bool, left: int
) -> None:
    files = opened(tmp_path)
    for owner in (OWNER, OTHER, OPEN):
        add(files, Place(owner, EDITION), 0, 10)
    again = PrefixFiles(tmp_path, files.limit)
    again.keep_owners(owners, anonymous=anonymous)
    kept = {*owners, *([OPEN] if anonymous else [])}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert len(again) == left
    assert again.add_node(Place(OTHER, EDITION), b"x" * 16, ROOT, 0, TOKENS) is None


@pytest.mark.parametrize("owner", ["open-../../../x", "open-", "open-" + "G" * 32, ".."])
def test_a_name_that_is_no_owner_gets_no_folder(tmp_path: Path, owner: str) -> None:
    files = opened(tmp_path / "prefixes")
    files.keep_owners([owner], anonymous=True)
    assert files.add_node(Place(owner, EDITION), b"x" * 16, ROOT, 0, TOKENS) is None
    assert list(tmp_path.rglob("*")) == []


def test_leftovers_and_links_are_removed_at_the_start_and_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "prefixes", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    files = opened(folder)
    path = files._path_of(add(files, PLACE, 0, 10))
    (path / ".new-0123").write_text("half")
    (path / "r7").symlink_to(outside / "precious")
    (path / "r8").mkdir()
    (folder / OTHER).symlink_to(outside)
    (folder / "notes.txt").write_text("x")
    again = opened(folder)
    assert len(again) == 1
    assert {p.name for p in path.iterdir()} == {"tokens", "r0"}
    assert [p.name for p in folder.iterdir()] == [OWNER]
    assert (outside / "precious").read_text() == "x"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, failing_disk: FailingDisk) -> None:
    files = opened(tmp_path)
    node = add(files, PLACE, 0, 10)
    before = files.nbytes
    failing_disk.room = 500
    with pytest.raises(OSError, match="No space"):
        files.write(node, "1", {}, [memoryview(bytes(1000))], rows=True)
    assert {p.name for p in files._path_of(node).iterdir()} == {"tokens", "r0"}
    assert files.nbytes == before


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path, failing_disk: FailingDisk) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((InvalidOption, DiskFull), match="cannot write prefixes to"):
        prepare_folder(tmp_path / "file" / "prefixes", 2**20)
    prepare_folder(tmp_path / "prefixes", 2**20)
    assert list((tmp_path / "prefixes").iterdir()) == []
    prepare_folder(tmp_path / "prefixes", 0)
    assert not (tmp_path / "prefixes").exists()
