"""Adoption: the slices that workers still hold are used again if they are the whole model that was ordered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator import held_slices
from cluster.coordinator.held_slices import adopt_held_slices, adoptable_plan
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.limits import ADOPTION_LOOKS, MIB
from cluster.core.plan import LayerRange, ModelRef, ModelShape
from cluster.core.worker import WorkerInfo
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust

MODEL = ModelRef("m", "", "f" * 64)
SHAPE = ModelShape(MODEL, 6, (10 * MIB,) * 6, (MIB,) * 6, (), (1, 2, 3, 4, 5), (), 64)
ORDER = LoadOrder("m", worker_count=3)
EPOCH = 7


def worker(name: str) -> WorkerInfo:
    return WorkerInfo(f"id-{name}", name, "", f"{name}:1", f"{name}:2", "", "", "", 0, 40 * MIB)


def holding(name: str, start: int, end: int, **more: object) -> WorkerInfo:
    held = {"epoch": EPOCH, "layers": LayerRange(start, end), "fingerprint": MODEL.fingerprint, **more}
    return replace(worker(name), **held)  # type: ignore[arg-type]


STAGES = (holding("ada", 0, 2), holding("bob", 2, 4), holding("cyd", 4, 6))


def adopted(*workers: WorkerInfo, order: LoadOrder = ORDER) -> list[str] | None:
    found = adoptable_plan(SHAPE, order, workers)
    return [f"{w.name} {r}" for w, r in zip(found[0], found[1].layers or (), strict=True)] if found else None


def test_held_slices_are_adopted_if_they_are_the_whole_model() -> None:
    assert adopted(*reversed(STAGES), worker("dee")) == ["ada 0-1", "bob 2-3", "cyd 4-5"]
    assert adopted(*STAGES, order=replace(ORDER, worker_count=None)) is not None
    assert adopted(*STAGES[:2]) is None
    assert adopted(*STAGES[:2], holding("cyd", 4, 6, epoch=EPOCH - 1)) is None
    assert adopted(*STAGES[:2], holding("cyd", 4, 6, fingerprint="other")) is None
    assert adopted(*STAGES[:2], holding("cyd", 4, 6, draining=True)) is None
    assert adopted(*STAGES, order=replace(ORDER, worker_count=2)) is None
    assert adopted(*STAGES, order=replace(ORDER, kv_bits=4)) is None
    assert adopted(*STAGES, order=replace(ORDER, quantize=4)) is None
    asked = (LayerRange(0, 1), LayerRange(1, 4), LayerRange(4, 6))
    assert adopted(*STAGES, order=replace(ORDER, layers=asked)) is None


class Looks(Roster):
    """A roster whose members are given, and which counts how often it is refreshed."""

    def __init__(self, *workers: WorkerInfo) -> None:
        super().__init__(static_source([]), "c", "me", LocalTrust())
        self.members = tuple(RosterEntry(worker) for worker in workers)
        self.looks = 0

    async def refresh(self) -> tuple[RosterEntry, ...]:
        self.looks += 1
        return self.members


@pytest.mark.anyio
async def test_only_slices_from_before_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_slices, "SETTLE_S", 0.0)
    before = Looks(holding("ada", 0, 2, owner="me"))
    workers = tuple(member.info for member in before.members)
    assert await adopt_held_slices(SHAPE, ORDER, workers, before) == (workers, ORDER)
    assert before.looks == ADOPTION_LOOKS
    now = Looks()
    now.members = (RosterEntry(holding("ada", 0, 2, owner="me", live_owner_process=now.instance)),)
    assert await adopt_held_slices(SHAPE, ORDER, workers, now) == (workers, ORDER)
    assert now.looks == 0, "what this process had loaded was waited for"
