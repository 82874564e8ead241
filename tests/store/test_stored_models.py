"""What the store lists, what it removes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cluster.core.errors import DiskFull, ModelInUse, ModelNotFound
from cluster.core.plan import LayerRange
from cluster.core.stored_models import StoredModel
from cluster.store.disk_quota import make_room, read_quota, set_quota
from cluster.store.store import Store
from cluster.store.store_server import StoreServer
from cluster.store.stored_models import (
    choose_for_pruning,
    find_models,
    list_models,
    remove_leftovers,
    remove_model,
)
from fake_hub import FakeHub
from integration.daemons import command
from store.test_tensor_fetch import fetch, of_layer, opened

DAY_S = 86_400.0


def stored(number: int, size: int, *, in_use: bool = False, name: str = "") -> StoredModel:
    """Return a model that was last used at the time ``number``."""
    digest = f"{number:064x}"
    return StoredModel(digest, (name,) if name else (), f"/models/{digest}", size, size, (), float(number), in_use)


def test_a_model_is_listed_with_its_layers_and_its_space(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    assert list_models(tmp_path) == ()
    partial = opened(tmp_path)
    fetch(tmp_path, partial, [name for layer in "12" for name in of_layer(partial, f"model.layers.{layer}.")])
    (listed,) = list_models(tmp_path)
    assert (listed.names, listed.label) == (("owner/tiny",), "owner/tiny")
    assert listed.fingerprint == partial.fingerprint
    assert listed.layers == (LayerRange(1, 3),)
    assert listed.model_bytes == sum(tensor.nbytes for tensor in partial.tensors.values())
    assert listed.in_use
    del partial
    (listed,) = list_models(tmp_path)
    assert not listed.in_use, "its last user is gone"


def test_looking_at_a_model_is_no_use_of_it(hub: FakeHub, tmp_path: Path) -> None:
    opened(tmp_path)
    (before,) = list_models(tmp_path)
    lock = Path(before.folder) / ".macpipe" / "lock"
    os.utime(lock, (1.0, 1.0))
    os.utime(before.folder, (1.0, 1.0))
    assert [one.last_used for one in list_models(tmp_path)] == [1.0]
    assert Store(tmp_path).find_kept(before.fingerprint) is not None
    assert list_models(tmp_path)[0].last_used > 1.0


def test_a_model_that_is_open_stays(hub: FakeHub, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    with pytest.raises(ModelInUse, match="has the model owner/tiny open; stop this Mac"):
        remove_model(tmp_path, partial.fingerprint)
    fingerprint = partial.fingerprint
    assert partial.folder.is_dir()
    del partial
    remove_model(tmp_path, fingerprint)
    assert list_models(tmp_path) == ()
    assert list((tmp_path / "models" / "refs").iterdir()) == []
    assert [one.name for one in (tmp_path / "models").iterdir()] == ["refs"]
    with pytest.raises(ModelNotFound):
        remove_model(tmp_path, fingerprint)


def test_a_model_that_was_released_can_be_removed(hub: FakeHub, tmp_path: Path) -> None:
    """A coordinator that has unloaded a model may hold the object for longer."""
    partial = opened(tmp_path)
    partial.release()
    partial.release()
    assert not list_models(tmp_path)[0].in_use
    remove_model(tmp_path, partial.fingerprint)


def test_a_shared_model_is_open_until_it_is_released(hub: FakeHub, tmp_path: Path) -> None:
    shares = StoreServer(Store(tmp_path))
    partial = opened(tmp_path)
    item = shares.share(partial.folder, partial)
    fingerprint = partial.fingerprint
    item.coming = frozenset(partial.tensors)
    shares.release()
    del partial, item
    assert list_models(tmp_path)[0].in_use, "it is being fetched"
    shares.share(Path(list_models(tmp_path)[0].folder), Store(tmp_path).find_by_name("owner/tiny").partial)
    shares.release(keep=fingerprint)
    assert list_models(tmp_path)[0].in_use
    shares.release()
    assert not list_models(tmp_path)[0].in_use


def test_a_damaged_model_is_listed_so_that_it_can_be_removed(hub: FakeHub, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    fingerprint = partial.fingerprint
    (partial.folder / "config.json").unlink()
    del partial
    (listed,) = list_models(tmp_path)
    assert (listed.fingerprint, listed.layers) == (fingerprint, ())
    remove_model(tmp_path, fingerprint)
    assert list_models(tmp_path) == ()


def test_models_are_named_by_id_or_fingerprint() -> None:
    one, two = stored(1, 5, name="owner/a@v2"), stored(2, 5, name="owner/a")
    assert find_models((one, two), "owner/a") == (one, two)
    assert find_models((one, two), "owner/a@v2") == (one,)
    assert find_models((one, two), two.fingerprint) == (two,)
    for wrong in ("owner/b", "0000000", "", "/models"):
        with pytest.raises(ModelNotFound, match="macpipe store list"):
            find_models((one, two), wrong)


def test_pruning_takes_the_least_recently_used_and_none_in_use() -> None:
    oldest, old, fresh = stored(1, 10, in_use=True), stored(2, 20), stored(90, 30)
    models = (fresh, oldest, old)
    assert choose_for_pruning(models, 100, unused_s=50) == (old,)
    assert choose_for_pruning(models, 100, keep_bytes=60) == ()
    assert choose_for_pruning(models, 100, keep_bytes=59) == (old,)
    assert choose_for_pruning(models, 100, keep_bytes=39) == (old, fresh)
    assert choose_for_pruning(models, 100, unused_s=50, keep_bytes=39) == (old, fresh)


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in (".new-a", ".rm-b", "other"):
        (models / name).mkdir(parents=True)
        (models / name / "part").write_bytes(b"x" * 5000)
    now = (models / ".new-a").stat().st_mtime
    assert remove_leftovers(tmp_path, now + DAY_S / 2) == 0
    assert remove_leftovers(tmp_path, now + 2 * DAY_S) >= 10_000
    assert [one.name for one in models.iterdir()] == ["other"]


def test_a_fetch_makes_room_within_the_quota(hub: FakeHub, tmp_path: Path) -> None:
    """The model of an earlier fetch goes, unless it is open; and none goes where that would not help."""
    earlier = opened(tmp_path)
    fetch(tmp_path, earlier, list(earlier.tensors))
    size = list_models(tmp_path)[0].disk_bytes
    set_quota(tmp_path, 2 * size)
    make_room(tmp_path, size // 2, "the model")
    with pytest.raises(DiskFull, match="macpipe store quota SIZE"):
        make_room(tmp_path, 2 * size, "the model")
    del earlier
    with pytest.raises(DiskFull):
        make_room(tmp_path, 3 * size, "the model")
    assert len(list_models(tmp_path)) == 1
    make_room(tmp_path, 2 * size, "the model")
    assert list_models(tmp_path) == ()


def test_a_fetch_beyond_the_quota_is_refused_before_the_first_byte(hub: FakeHub, tmp_path: Path) -> None:
    partial = opened(tmp_path)
    set_quota(tmp_path, 1)
    with pytest.raises(DiskFull, match="this Mac's store may take"):
        fetch(tmp_path, partial, list(partial.tensors))
    set_quota(tmp_path, None)
    fetch(tmp_path, partial, list(partial.tensors))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"quota_bytes": true}', '{"quota_bytes": -1}'])
def test_a_damaged_quota_counts_as_none(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    set_quota(tmp_path, 5)
    assert read_quota(tmp_path) == 5
    (tmp_path / "models" / "quota.json").write_text(content)
    assert read_quota(tmp_path) is None
    assert "store: the quota is ignored" in caplog.text


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("store", *arguments, "--home", str(home)), capture_output=True, text=True, timeout=40)


@pytest.mark.timeout(120)
def test_the_commands_list_prune_and_remove(hub: FakeHub, tmp_path: Path) -> None:
    fingerprint = opened(tmp_path).fingerprint
    table = run(tmp_path, "list")
    assert (table.returncode, table.stderr) == (0, "")
    assert "owner/tiny" in table.stdout
    assert "1 model, " in table.stdout
    kept = run(tmp_path, "prune", "--unused", "1d", "--json")
    assert json.loads(kept.stdout) == {"removed": [], "bytes": 0}
    shown = run(tmp_path, "prune", "--keep", "1KiB", "--dry-run")
    assert shown.stdout.startswith("would remove owner/tiny (")
    gone = run(tmp_path, "rm", fingerprint[:12], "--json")
    assert [one["fingerprint"] for one in json.loads(gone.stdout)["removed"]] == [fingerprint]
    assert json.loads(run(tmp_path, "list", "--json").stdout)["models"] == []
    again = run(tmp_path, "rm", "owner/tiny")
    assert (again.returncode, again.stdout) == (1, "")
    assert "the store of this Mac has no model 'owner/tiny'" in again.stderr
    assert run(tmp_path, "prune").returncode == 2
    assert run(tmp_path, "quota", "2GiB").stdout == "the store may take 2.0 GiB\n"
    assert json.loads(run(tmp_path, "quota", "off", "--json").stdout) == {"quota_bytes": None}
