"""Which workers are told who may have prefixes on disk, and when disks are used."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.coordinator.prefix_disks import PrefixDisks, PrefixOwners

BEGINNING = (512, b"x" * 32)


class Disk:
    """A worker that records the owners that it is told."""

    def __init__(self) -> None:
        self.told: list[Collection[str]] = []

    async def open_prefixes(
        self, epoch: int, edition: str, owners: Collection[str], *, anonymous: bool
    ) -> list[tuple[int, bytes]]:
        self.told.append(owners)
        return [BEGINNING] if edition else []


@pytest.mark.parametrize(
    ("limits", "edition", "used"),
    [((9, 9), "e", True), ((9, 0), "e", False), ((9, 9), "", False), ((0, 0), "e", False)],
)
def test_a_revoked_keys_prefixes_go_also_where_disks_are_not_used(
    limits: tuple[int, ...], edition: str, used: bool
) -> None:
    names = {"amy", "bob"}
    disks = PrefixDisks(lambda: PrefixOwners(frozenset(names), anonymous=False))
    workers = [SimpleNamespace(name=f"mac-{i}", prefix_disk_limit=limit) for i, limit in enumerate(limits)]
    controls = [Disk() for _ in limits]
    plan = SimpleNamespace(epoch=1, is_grouped=False)
    epoch = cast(Any, SimpleNamespace(plan=plan, workers=workers, controls=controls))

    async def serve() -> bool:
        contents = await disks.open(epoch, edition)
        names.remove("amy")
        await disks.follow_owners()
        return contents is not None

    assert asyncio.run(serve()) == used
    assert disks.problem == ""
    for limit, control in zip(limits, controls, strict=True):
        assert control.told == ([{"amy", "bob"}, {"bob"}] if limit else [])


@pytest.mark.parametrize(("limit", "said"), [(9, "no prefix is kept on disk: Macs that share layers"), (0, "")])
def test_disks_that_a_group_does_not_use_are_told(limit: int, said: str) -> None:
    disks = PrefixDisks(PrefixOwners)
    workers = [SimpleNamespace(name=name, prefix_disk_limit=limit) for name in ("ada", "bob")]
    plan = SimpleNamespace(epoch=1, is_grouped=True)
    assert asyncio.run(disks.open(cast(Any, SimpleNamespace(plan=plan, workers=workers, controls=[])), "e")) is None
    assert disks.problem.startswith(said)
    assert bool(disks.problem) == bool(said)
