"""The stores of all Macs: what is listed and removed, and what becomes of a removal that not all Macs follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.cluster_stores import ClusterStores
from cluster.coordinator.roster import RosterEntry
from cluster.core.errors import InvalidRequest, ModelInUse, ModelNotFound, VersionMismatch, WorkerLost
from cluster.core.plan import LayerRange
from cluster.core.stored_models import MacStore, StoredModel, StoreRemoval
from coordinator.test_examinations import entry


def model(number: int, *names: str, in_use: bool = False, layers: tuple[int, int] = (0, 4)) -> StoredModel:
    digest, ranges = f"{number:064x}", (LayerRange(*layers),)
    return StoredModel(digest, names, f"/models/{digest}", 100 + number, 200, ranges, float(number), in_use)


class Macs:
    """Workers that answer with ``stores``, by name, or raise what is there instead."""

    def __init__(self, home: Path, **stores: MacStore | Exception) -> None:
        self.answers = {name.replace("_", "-"): answer for name, answer in stores.items()}
        self.kept: dict[str, Exception] = {}
        self.asked: list[str] = []
        self.removed: list[tuple[str, str]] = []
        roster: Any = SimpleNamespace(control=self._control)
        self.stores = ClusterStores(roster, self._members, home)

    async def _members(self) -> tuple[RosterEntry, ...]:
        return (*map(entry, self.answers), entry("mac-9", problem="mac-9 does not answer", reachable=False))

    def _control(self, name: str) -> Any:
        async def list_stored() -> MacStore:
            self.asked.append(name)
            if isinstance(answer := self.answers[name], Exception):
                raise answer
            return replace(answer, mac=name)

        async def remove_stored(fingerprint: str) -> None:
            if name in self.kept:
                raise self.kept[name]
            self.removed.append((name, fingerprint))

        return SimpleNamespace(list_stored=list_stored, remove_stored=remove_stored)


def store(id: str, *models: StoredModel) -> MacStore:  # noqa: A002
    return MacStore("", f"/{id}", id, models)


@pytest.mark.anyio
async def test_each_mac_is_listed_or_says_why_not(tmp_path: Path) -> None:
    first, second = model(1, "o/a", layers=(0, 2)), model(1, layers=(2, 4))
    failures = {"mac_3": VersionMismatch("no such call"), "mac_4": WorkerLost("worker mac-4 does not answer")}
    macs = Macs(tmp_path, mac_1=store("s1", first), mac_2=store("s2", second), **failures)
    listed = await macs.stores.list_stores()
    assert [(one.mac, one.models, one.problem) for one in listed] == [
        ("mac-1", (first,), ""),
        ("mac-2", (second,), ""),
        ("mac-3", (), "it runs macpipe 0.0.9, which cannot list its models for others"),
        ("mac-4", (), "worker mac-4 does not answer"),
        ("mac-9", (), "mac-9 does not answer"),
    ]


@pytest.mark.anyio
async def test_a_removal_reaches_all_macs_and_says_who_kept_what(tmp_path: Path) -> None:
    """A Mac that got the model from another one knows only its fingerprint."""
    named, nameless, other = model(1, "o/a"), model(1), model(2, "o/b")
    macs = Macs(tmp_path, mac_1=store("s1", named, other), mac_2=store("s2", nameless), mac_3=store("s3", nameless))
    macs.kept = {"mac-2": ModelInUse("worker mac-2: it is open"), "mac-3": ModelNotFound("it is gone")}
    assert await macs.stores.remove(["o/a"]) == (
        StoreRemoval("mac-1", "o/a", freed_bytes=101),
        StoreRemoval("mac-2", "o/a", problem="worker mac-2: it is open"),
        StoreRemoval("mac-9", problem="mac-9 does not answer"),
    )
    assert macs.removed == [("mac-1", named.fingerprint)]


@pytest.mark.anyio
async def test_a_model_in_use_anywhere_stays_everywhere(tmp_path: Path) -> None:
    macs = Macs(tmp_path, mac_1=store("s1", model(1, "o/a"), model(2, "o/b")), mac_2=store("s2", model(2, in_use=True)))
    with pytest.raises(ModelInUse, match="the model o/b is in use on mac-2; "):
        await macs.stores.remove(["o/a", "o/b"])
    with pytest.raises(ModelNotFound, match="no Mac that answers has a model 'o/c'"):
        await macs.stores.remove(["o/c", "o/a"])
    for wrong in ([], ["o/a"] * 65):
        with pytest.raises(InvalidRequest, match="1 to 64 models"):
            await macs.stores.remove(wrong)
    assert macs.removed == []


@pytest.mark.anyio
async def test_workers_that_share_a_store_are_one_entry_and_one_removal(tmp_path: Path) -> None:
    """The second worker may have closed the model after the first was asked."""
    shared = store("s1", model(1, "o/a", in_use=True))
    macs = Macs(tmp_path, mac_1=shared, mac_2=shared)
    assert [one.mac for one in await macs.stores.list_stores()] == ["mac-1, mac-2", "mac-9"]
    assert sorted(macs.asked) == ["mac-1", "mac-1", "mac-2"]
    macs.answers = dict.fromkeys(macs.answers, store("s1", model(1, "o/a")))
    assert [one.mac for one in await macs.stores.remove(["o/a"])] == ["mac-1, mac-2", "mac-9"]
    assert macs.removed == [("mac-1", model(1).fingerprint)]
