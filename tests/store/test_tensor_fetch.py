"""Fetching from the hub into a partial checkpoint: only the wanted bytes, whatever the network does."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from cluster.core.errors import Aborted, DiskFull, FetchFailed, InvalidOption
from cluster.core.limits import GIB, MIB
from cluster.model.checkpoint import TensorInfo, open_checkpoint
from cluster.store import range_download as runs
from cluster.store.digest_manifest import DigestManifest
from cluster.store.disk_space import free_bytes
from cluster.store.folder_digests import hash_tensors
from cluster.store.hub import Hub
from cluster.store.partial_checkpoint import PartialCheckpoint, lock_file, place
from cluster.store.store import Store
from cluster.store.tensor_fetch import Fetch, Wanted
from disks import FailingDisk, SmallDisk
from fake_hub import FakeHub

LAYER = "model.layers.1."


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FETCH_BACKOFF_S", 0.01)


def opened(home: Path) -> PartialCheckpoint:
    partial = Store(home).find_by_name("owner/tiny").partial
    assert partial
    return partial


def fetch(home: Path, partial: PartialCheckpoint, names: list[str], **options: object) -> Fetch:
    made = Fetch(
        partial,
        DigestManifest(home, partial.fingerprint),
        Wanted(tuple(names)),
        hub=options.pop("hub", Hub(partial.origin.repo, partial.origin.commit)),  # type: ignore[arg-type]
        stop=options.pop("stop", Event()),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )
    made.run()
    return made


def of_layer(partial: PartialCheckpoint, layer: str = LAYER) -> list[str]:
    return [name for name in partial.tensors if name.startswith(layer)]


def flip(partial: PartialCheckpoint, tensor: TensorInfo) -> None:
    """Damage its first byte on the disk."""
    with (partial.folder / tensor.file).open("r+b") as file:
        file.seek(tensor.offset)
        old = file.read(1)
        file.seek(tensor.offset)
        file.write(bytes([old[0] ^ 1]))


def neighbours(partial: PartialCheckpoint) -> tuple[list[str], list[str]]:
    """Tensors of two slices that lie in one file, and are not all that it has."""
    own = of_layer(partial)
    file = partial.tensors[own[0]].file
    others = [name for name, tensor in partial.tensors.items() if tensor.file == file and name not in own][1:]
    assert others
    return own, others


def same_bytes(partial: PartialCheckpoint, published: Path, names: list[str]) -> bool:
    whole = open_checkpoint(published).tensors
    return all(
        (partial.folder / t.file).read_bytes()[t.offset : t.end] == (published / t.file).read_bytes()[t.offset : t.end]
        for t in (whole[name] for name in names)
    )


def test_headers_alone_make_a_folder_like_the_whole_one(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    assert partial.tensors == open_checkpoint(published).tensors
    whole = sum(t.nbytes for t in partial.tensors.values())
    assert 0 < hub.weight_bytes < 0.2 * whole
    blocks = sum((partial.folder / file).stat().st_blocks * 512 for file in {t.file for t in partial.tensors.values()})
    assert blocks < whole, "the files are sparse"


def test_two_models_with_the_same_headers_are_kept_apart(
    hub: FakeHub, published: Path, tmp_path: Path, tuned: Path
) -> None:
    """For example two fine-tunes of one model."""
    hub.folders["owner/tuned"] = tuned
    one, other = opened(tmp_path), Store(tmp_path).find_by_name("owner/tuned").partial
    assert other
    assert one.tensors == other.tensors
    assert one.folder != other.folder
    names = of_layer(one)
    for partial, source in ((one, published), (other, tuned)):
        fetch(tmp_path, partial, names)
        assert same_bytes(partial, source, names)


def test_only_the_wanted_ranges_are_asked_for(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    names, headers = of_layer(partial), hub.weight_bytes
    told = fetch(tmp_path, partial, names).progress
    wanted = sum(partial.tensors[name].nbytes for name in names)
    assert hub.weight_bytes - headers == told.hub == told.done == told.total == wanted
    assert same_bytes(partial, published, names)
    asked = len([one for one in hub.ranges if one[1] > 8 and one[0].endswith("safetensors")])
    assert asked - 3 <= len(names), "neighbours are asked for together"
    before = hub.weight_bytes
    fetch(tmp_path, PartialCheckpoint(partial.folder), names)
    assert hub.weight_bytes == before


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial, headers = opened(tmp_path), hub.weight_bytes
    hub.cut_after = 8192
    names = list(partial.tensors)
    fetch(tmp_path, partial, names)
    assert same_bytes(partial, published, names)
    assert hub.weight_bytes - headers == sum(t.nbytes for t in partial.tensors.values())
    assert not partial.unproved_files(), "whole files were held against the hub's hashes"


class SomeFetched(Event):
    """Set once some of the tensors' bytes are there."""

    def __init__(self, partial: PartialCheckpoint) -> None:
        super().__init__()
        self._partial = partial

    def is_set(self) -> bool:
        return any(self._partial.missing_bytes(t) < t.nbytes for t in self._partial.tensors.values())

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(timeout) or self.is_set()


def test_who_stops_in_the_middle_goes_on_there(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    hub.pace_s = 0.02
    names = list(partial.tensors)
    with pytest.raises(Aborted):
        fetch(tmp_path, partial, names, stop=SomeFetched(partial))
    hub.pace_s = 0
    again = PartialCheckpoint(partial.folder)
    had = sum(t.nbytes - again.missing_bytes(t) for t in again.tensors.values())
    assert had > 0
    told = fetch(tmp_path, again, names).progress
    assert told.hub == told.total - had < told.total
    assert same_bytes(again, published, names)


def test_wrong_bytes_of_a_known_tensor_are_refused_by_name(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    partial = opened(tmp_path)
    name = LAYER + "mlp.up_proj.weight"
    fetch(tmp_path, partial, [name])
    file = partial.tensors[name].file
    partial.drop(partial.tensors[name])
    hub.spoiled[file] = 1
    with pytest.raises(FetchFailed, match=name), caplog.at_level(logging.WARNING):
        fetch(tmp_path, partial, [name])
    assert f"the hub has damaged bytes of the tensor {name}" in caplog.text
    fetch(tmp_path, partial, [name])
    assert name in partial.verified


def test_wrong_bytes_of_an_unknown_file_are_caught_by_the_hubs_hash(
    hub: FakeHub, published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    partial = opened(tmp_path)
    (bad, *_) = (t.file for t in partial.tensors.values())
    hub.spoiled[bad] = 1
    with caplog.at_level(logging.WARNING):
        fetch(tmp_path, partial, list(partial.tensors))
    assert f"fetch: file does not match the hub's hash, fetching again file={bad}" in caplog.text
    assert same_bytes(partial, published, list(partial.tensors))
    assert not partial.unproved_files()
    known = DigestManifest(tmp_path, partial.fingerprint).known
    assert all(known[name] == partial.digest(tensor) for name, tensor in partial.tensors.items())


def test_a_byte_that_flips_on_the_disk_is_fetched_again(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    names = of_layer(partial)
    fetch(tmp_path, partial, names)
    tensor = partial.tensors[names[0]]
    flip(partial, tensor)
    before, again = hub.weight_bytes, PartialCheckpoint(partial.folder)
    fetch(tmp_path, again, names)
    assert hub.weight_bytes - before == tensor.nbytes
    assert same_bytes(again, published, names)


def test_another_slice_does_not_vouch_for_damaged_bytes(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    own, others = neighbours(partial)
    fetch(tmp_path, partial, own)
    flip(partial, partial.tensors[own[0]])
    fetch(tmp_path, PartialCheckpoint(partial.folder), others)
    again = PartialCheckpoint(partial.folder)
    assert own[0] not in again.verified
    told = fetch(tmp_path, again, own).progress
    assert told.hub == partial.tensors[own[0]].nbytes
    assert same_bytes(again, published, own + others)
    fetch(tmp_path, PartialCheckpoint(partial.folder), own + others, hub=None)
    assert set(own + others) <= set(PartialCheckpoint(partial.folder).verified), "all is proved, and sealed"


def test_another_slice_does_not_vouch_for_missing_bytes(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    own, others = neighbours(partial)
    fetch(tmp_path, partial, own)
    flip(partial, partial.tensors[own[0]])
    with pytest.raises(FetchFailed, match=own[0]):
        fetch(tmp_path, PartialCheckpoint(partial.folder), own, hub=None)
    fetch(tmp_path, PartialCheckpoint(partial.folder), others)
    for _ in range(2):
        again = PartialCheckpoint(partial.folder)
        assert own[0] not in again.verified
        with pytest.raises(FetchFailed, match=own[0]):
            fetch(tmp_path, again, own, hub=None)
    fetch(tmp_path, again, own)
    assert same_bytes(again, published, own + others)


def test_a_digest_that_was_forgotten_verifies_nothing(hub: FakeHub, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    names = of_layer(partial)
    fetch(tmp_path, partial, names)
    partial.drop(partial.tensors[names[0]], forget=True)
    partial.seal()
    assert sorted(PartialCheckpoint(partial.folder).verified) == sorted(names[1:])


def test_who_comes_second_takes_the_folder_of_the_first(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = opened(tmp_path)
    looks = iter((False, True))
    monkeypatch.setattr("cluster.store.partial_checkpoint.is_partial", lambda _: next(looks))
    small = Hub(partial.origin.repo, partial.origin.commit).small
    assert place(tmp_path / "models", partial.origin, small) == partial.folder
    looks = iter((False, False))
    with pytest.raises(InvalidOption, match=partial.folder.name):
        place(tmp_path / "models", partial.origin, small)
    assert not list((tmp_path / "models").glob(".new-*"))


def test_a_full_disk_is_told_before_the_first_byte(hub: FakeHub, tmp_path: Path) -> None:
    partial, headers = opened(tmp_path), hub.weight_bytes
    with pytest.raises(
        DiskFull, match=r"owner/tiny needs 0\.\d\d MiB more on disk, but only 0\.5 GiB are free at "
    ) as told:
        fetch(tmp_path, partial, list(partial.tensors), free=lambda _: GIB // 2, what="owner/tiny")
    assert str(partial.folder) in told.value.sentence
    assert told.value.details["free_bytes"] == str(GIB // 2)
    assert hub.weight_bytes == headers
    assert free_bytes(tmp_path / "not" / "there") > 0


def open_below(folder: Path) -> list[str]:
    """Files of ``folder`` that this process has open."""
    found = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return [str(path) for path in found if path.is_relative_to(folder)]


@pytest.mark.small_disk
def test_a_disk_that_fills_up_spoils_nothing_and_the_fetch_goes_on_after_it(
    hub: FakeHub, published: Path, tmp_path: Path, small_disk: Callable[[Path, int], SmallDisk]
) -> None:
    home = tmp_path / "home"
    disk = small_disk(home, 16 * MIB)
    disk.fill()
    with pytest.raises(DiskFull, match="No space left on device"):
        opened(home)
    assert not list((home / "models").glob(".new-*"))
    disk.free()
    partial = opened(home)
    names = list(partial.tensors)
    for room in (0, 16 * 1024, 64 * 1024):
        disk.fill(leave=room)
        with pytest.raises(DiskFull, match="No space left on device"):
            fetch(home, partial, names, free=lambda _: GIB)
        assert set(open_below(home)) == {str(lock_file(partial.folder))}  # of the failed fetch and of this one
        disk.free()
        partial = PartialCheckpoint(partial.folder)  # as after a restart
        assert same_bytes(partial, published, list(partial.verified))
    fetch(home, partial, names, free=lambda _: GIB)
    assert same_bytes(PartialCheckpoint(partial.folder), published, names)
    assert set(PartialCheckpoint(partial.folder).verified) == set(names)


def test_what_is_known_of_a_model_counts_though_it_cannot_be_written(
    tmp_path: Path, failing_disk: FailingDisk, published: Path
) -> None:
    names = list(open_checkpoint(published).tensors)[:3]
    failing_disk.room = 10
    found = hash_tensors(tmp_path, published, names, Event())
    assert set(found) == set(names)
    manifest = DigestManifest(tmp_path, "ab" * 32)
    manifest.learn(found.items(), "this Mac")
    assert manifest.known == found
    failing_disk.room = None
    assert hash_tensors(tmp_path, published, names, Event()) == found
    assert not DigestManifest(tmp_path, "ab" * 32).known


def test_a_journal_that_was_cut_off_is_read_as_far_as_it_goes(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    names = of_layer(partial)
    fetch(tmp_path, partial, names)
    journal = partial.folder / ".macpipe" / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 7)
    again = PartialCheckpoint(partial.folder)
    fetch(tmp_path, again, list(again.tensors))
    assert same_bytes(again, published, list(again.tensors))
    digest = hashlib.sha256((published / again.tensors[names[0]].file).read_bytes()).hexdigest()
    assert digest in {file.sha256 for file in again.origin.files}
