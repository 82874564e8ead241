"""Adoption: the slices that workers still hold are used again if they are the whole model that was ordered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator import held_slices
from cluster.coordinator.held_slices import InheritedSlices, adopt_held_slices, adoptable_plan
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.slice_claims import SliceClaims
from cluster.coordinator.stage_setup import WorkerShare
from cluster.core.limits import ADOPTION_LOOKS, MIB
from cluster.core.plan import LayerRange, ModelRef, ModelShape, PlannedStage, StageSpec
from cluster.core.worker import HeldSlice, WorkerInfo
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


def holding_two(name: str, *slices: HeldSlice, owner: str = "me") -> WorkerInfo:
    first = slices[0]
    info = holding(name, 0, 1, owner=owner, slices=slices, memory_limit=100)
    return replace(info, epoch=first.epoch, layers=first.layers, fingerprint=first.fingerprint)


FIRST = HeldSlice(5, LayerRange(0, 6), "a", "f-a", memory_limit=30)
SECOND = HeldSlice(EPOCH, LayerRange(0, 6), "m", MODEL.fingerprint, memory_used=20)
A, M = ModelEntry("first", LoadOrder("a")), ModelEntry("second", LoadOrder("m"))


@pytest.mark.anyio
async def test_a_model_adopts_its_own_slice_of_several_and_leaves_those_of_others() -> None:
    roster, claims = Looks(holding_two("ada", FIRST, SECOND)), SliceClaims()
    first, second = RosterView(roster, "first", claims), RosterView(roster, "second", claims)
    order = LoadOrder("m")
    found, narrowed = await adopt_held_slices(SHAPE, order, (), second)
    assert (found[0].epoch, found[0].layers, narrowed.worker_count) == (EPOCH, LayerRange(0, 6), 1)
    inherited = InheritedSlices(roster, claims)
    inherited.keep_for([A])
    assert inherited.heirs == {"first"}
    stage = PlannedStage(StageSpec(9, 0, 1, MODEL, LayerRange(0, 6), 64), "ada", 19, 0)
    assert second.claim("ada:1", stage) == WorkerShare((5,), 20)
    (left,) = second.measure_memory([found[0]])
    assert left.memory_limit == 70
    assert first.held_slices[0].memory_limit == 80
    assert first.claim("ada:1", stage).keep == (9,)


def test_what_is_kept_for_models_that_are_not_loaded_is_given_up_for_one_that_does_not_fit() -> None:
    roster, claims = Looks(holding_two("ada", FIRST, SECOND)), SliceClaims()
    inherited = InheritedSlices(roster, claims)
    assert not inherited.give_up([A, M])
    inherited.keep_for([A, M])
    assert inherited.heirs == {"first", "second"}
    assert len(RosterView(roster, "third", claims).others) == 2
    assert inherited.give_up([M]), "first is loaded by now"
    assert inherited.heirs == {"first"}
    assert [holder for _, holder, _ in RosterView(roster, "third", claims).others] == ["first"]
    inherited.settle("first")
    assert not inherited.heirs, "what a loaded model holds is its own"


def test_only_slices_from_before_of_the_same_precision_are_kept() -> None:
    claims = SliceClaims()
    quantized = ModelEntry("first", LoadOrder("a", quantize=4))
    for worker, entry in ((holding_two("ada", FIRST, owner="other"), A), (holding_two("ada", FIRST), quantized)):
        inherited = InheritedSlices(Looks(worker), claims)
        inherited.keep_for([entry])
        assert not inherited.heirs


def test_a_leader_that_was_elected_keeps_what_its_predecessor_loaded_and_nothing_else() -> None:
    claims = SliceClaims()
    roster = Looks()
    led = replace(holding_two("ada", FIRST, SECOND), live_owner="me", live_owner_process=roster.instance)
    roster.members = (RosterEntry(led),)
    inherited = InheritedSlices(roster, claims)
    inherited.keep_for([A, M])
    assert not inherited.heirs, "this process loaded both"
    roster.inherited_epoch = FIRST.epoch
    inherited.keep_for([A, M])
    assert inherited.heirs == {"first"}


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
    assert await adopt_held_slices(SHAPE, ORDER, workers, RosterView(before, "m")) == (workers, ORDER)
    assert before.looks == ADOPTION_LOOKS
    elected = Looks(holding("ada", 0, 2, owner="me"))
    elected.inherited_epoch, elected.silent = EPOCH, {"bob:1"}
    monkeypatch.setattr(elected, "addresses", lambda: {"ada:1", "bob:1"})
    assert await adopt_held_slices(SHAPE, ORDER, workers, RosterView(elected, "m")) == (workers, ORDER)
    assert elected.looks == 0, "a worker was waited for that did not answer in the election"
    elected.silent.clear()
    assert await adopt_held_slices(SHAPE, ORDER, workers, RosterView(elected, "m")) == (workers, ORDER)
    assert elected.looks == ADOPTION_LOOKS, "bob answered in the election, and may be slow"
    now = Looks()
    now.members = (RosterEntry(holding("ada", 0, 2, owner="me", live_owner_process=now.instance)),)
    assert await adopt_held_slices(SHAPE, ORDER, workers, RosterView(now, "m")) == (workers, ORDER)
    assert now.looks == 0, "what this process had loaded was waited for"
