"""Hashes of weights, compared with each other and with known ones: an error names the worker and the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.coordinator.weight_distribution import compare
from cluster.core.errors import ModelDiffers
from cluster.core.plan import LoadedStage
from cluster.store.digest_manifest import DigestManifest

A, B = "a" * 64, "b" * 64


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
