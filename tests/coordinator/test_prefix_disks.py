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
    epoch = cast(Any, SimpleNamespace(plan=SimpleNamespace(epoch=1), workers=workers, controls=controls))

    async def serve() -> bool:
        contents = await disks.open(epoch, edition)
        names.remove("amy")
        await disks.follow_owners()
        return contents is not None

    assert asyncio.run(serve()) == used
    for limit, control in zip(limits, controls, strict=True):
        assert control.told == ([{"amy", "bob"}, {"bob"}] if limit else [])
