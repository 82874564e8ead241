"""Hashes of weights, compared with each other and with known ones: an error names the worker and the tensor."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from checkpoints import make
from cluster.coordinator.roster import Roster
from cluster.coordinator.weight_distribution import WeightDistribution, compare
from cluster.core.adapter import AdapterRef
from cluster.core.errors import ModelDiffers
from cluster.core.plan import LoadedStage
from cluster.core.text import parse_address
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust
from cluster.store.digest_manifest import DigestManifest
from cluster.store.store import FoundModel, Store

A, B = "a" * 64, "b" * 64


@pytest.mark.anyio
async def test_a_delivery_that_ends_closes_no_model_of_another_one(tmp_path: Path) -> None:
    """The recovery of one model ends while another one is loaded."""
    roster = Roster(static_source([]), "c", "me", LocalTrust())
    weights = WeightDistribution(Store(tmp_path / "home"), roster)
    plan: Any = SimpleNamespace(stages=())
    one, other = (make(kind, tmp_path / kind) for kind in ("llama", "qwen3"))

    def delivery(folder: Path) -> AbstractAsyncContextManager[object]:
        model_info: Any = SimpleNamespace(found=FoundModel(folder))
        return weights.delivery(plan, model_info, ())

    def share_in_part() -> set[str]:
        for item in weights._store_server._items.values():
            item.partial = item.partial or cast(Any, object())
        return set(weights._store_server._items)

    async with delivery(one):
        (first,) = share_in_part()
        async with delivery(other), delivery(one):
            assert len(share_in_part()) == 2
        assert set(weights._store_server._items) == {first}
    assert not weights._store_server._items


@pytest.mark.anyio
async def test_a_load_that_is_cancelled_closes_its_store_and_raises_nothing(tmp_path: Path) -> None:
    weights = WeightDistribution(Store(tmp_path), Roster(static_source([]), "c", "me", LocalTrust()))
    gone: Any = SimpleNamespace(ref=AdapterRef("gone", str(tmp_path / "gone"), A))
    worker: Any = SimpleNamespace(control_address="127.0.0.1:9", name="ada", id="ada")
    with anyio.CancelScope() as scope:
        async with weights.adapter_delivery([gone], [worker]) as [(own, *_)]:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(OSError, match="connect"):
        await anyio.connect_tcp(*parse_address(own.address))


def test_equal_digests_pass(tmp_path: Path) -> None:
    manifest = DigestManifest(tmp_path, "f")
    compare([LoadedStage("ada", (("x", A), ("y", B))), LoadedStage("bob", (("y", B),))], manifest)
    assert not manifest.known


def test_a_shared_tensor_that_differs_names_both(tmp_path: Path) -> None:
    stages = [LoadedStage("ada", (("tied", A),)), LoadedStage("bob", (("tied", B),))]
    with pytest.raises(ModelDiffers, match="worker ada and worker bob have different bytes of the tensor tied") as told:
        compare(stages, DigestManifest(tmp_path, "f"))
    assert told.value.details == {"worker": "bob", "tensor": "tied"}


def test_where_the_right_one_is_known_the_wrong_one_is_named(tmp_path: Path) -> None:
    DigestManifest(tmp_path, "f").learn([("tied", B)], "an earlier load")
    stages = [LoadedStage("ada", (("tied", A),)), LoadedStage("bob", (("tied", B),))]
    with pytest.raises(ModelDiffers, match="worker ada has another version of the tensor tied"):
        compare(stages, DigestManifest(tmp_path, "f"))


def test_a_manifest_is_kept_and_can_unlearn(tmp_path: Path) -> None:
    manifest = DigestManifest(tmp_path, "f")
    manifest.learn([("x", A), ("y", B)], "ada")
    manifest.learn([("x", A)], "bob")
    with pytest.raises(ModelDiffers, match="bob has different bytes of the tensor y"):
        manifest.learn([("y", A)], "bob")
    manifest.forget(["y"])
    assert dict(DigestManifest(tmp_path, "f").known) == {"x": A}
    manifest.learn([("y", A)], "cyd")
    assert dict(DigestManifest(tmp_path, "f").known) == {"x": A, "y": A}
