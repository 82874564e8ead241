"""What one holder of slices sees of the roster, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.slice_claims import SliceClaims
from cluster.coordinator.stage_setup import WorkerShare
from cluster.core.plan import LayerRange, ModelRef, Plan, PlannedStage, Route, StageSpec
from cluster.core.worker import HeldSlice, WorkerInfo
from cluster.discovery.static import static_source
from cluster.security.credentials import LocalTrust

ADA = WorkerInfo("1", "ada", "1", "127.0.0.1:1", "", "", "", "", 1, 1, cluster="c")
BOB = replace(ADA, id="2", name="bob", control_address="127.0.0.1:2")
CYD = replace(ADA, id="3", name="cyd", control_address="127.0.0.1:3")


def test_what_one_holder_pins_stays_when_another_lets_go() -> None:
    roster = Roster(static_source([]), "c", "me", LocalTrust())
    one, other = RosterView(roster, "one"), RosterView(roster, "other")
    one.pin([ADA])
    other.pin([ADA, BOB])
    other.pin_draft(CYD)
    assert roster.addresses() == {ADA.control_address, BOB.control_address, CYD.control_address}
    other.pin(())
    assert roster.addresses() == {ADA.control_address, CYD.control_address}
    other.pin_draft(None)
    one.pin([BOB])
    assert roster.addresses() == {BOB.control_address}


def a_stage(epoch: int, nbytes: int) -> PlannedStage:
    spec = StageSpec(epoch, 0, 1, ModelRef("m", "", "f"), LayerRange(0, 4), 16)
    return PlannedStage(spec, "ada", nbytes, nbytes)


def test_a_holder_sees_its_own_slice_and_the_memory_that_others_leave() -> None:
    roster, claims = Roster(static_source([]), "c", "me", LocalTrust()), SliceClaims()
    one, other = RosterView(roster, "one", claims), RosterView(roster, "other", claims)
    address = ADA.control_address
    one.pin([ADA])
    other.pin([ADA])
    assert one.claim(address, a_stage(5, 95)) == WorkerShare()
    assert other.claim(address, a_stage(6, 19)) == WorkerShare((5,), 40)
    assert one.claim(address, a_stage(7, 95)) == WorkerShare((6,), 200), "its slice of an older epoch goes"
    slices = (
        HeldSlice(6, LayerRange(0, 2), "b", "fb", data_port=71, busy_ms=9),
        HeldSlice(7, LayerRange(0, 4), "a", "fa", data_port=70, problem="its engine hangs"),
    )
    info = replace(ADA, epoch=6, memory_limit=1000, data_address="127.0.0.1:70", slices=slices)
    mine, theirs = one.focus(RosterEntry(info)), other.focus(RosterEntry(info))
    assert (mine.info.epoch, mine.info.layers, mine.info.memory_limit, mine.problem) == (
        7,
        LayerRange(0, 4),
        960,
        "its engine hangs",
    )
    assert (theirs.info.fingerprint, theirs.info.busy_ms, theirs.info.memory_limit, theirs.problem) == (
        "fb",
        9,
        800,
        "",
    )
    assert theirs.info.data_address == "127.0.0.1:71"
    lost = other.focus(RosterEntry(replace(info, slices=slices[1:])))
    assert (lost.info.epoch, lost.info.layers, lost.info.model) == (0, None, "")
    assert other.release(address, 5) == (7, 5), "the slice that another one is about to replace may still serve"
    kept = one.claim(address, a_stage(8, 95)).keep
    assert kept == (6,), "a slice is given up by its own epoch, or a newer one"
    assert other.release(address, 9) == (8, 7)
    alone = RosterEntry(info)
    assert one.focus(alone) is alone
    one.pin([BOB])
    assert other.claim(address, a_stage(9, 1)) == WorkerShare(), "who moved away leaves nothing to keep"
    claims.shared = True
    assert other.claim(address, a_stage(9, 19)) == WorkerShare((), 40), "others may come"


def test_a_plan_is_measured_again_once_others_have_claimed_memory() -> None:
    roster, claims = Roster(static_source([]), "c", "me", LocalTrust()), SliceClaims()
    one, other = RosterView(roster, "one", claims), RosterView(roster, "other", claims)
    info = replace(ADA, memory_limit=1000)
    roster.members = (RosterEntry(info),)
    before = one.others
    one.claim(info.control_address, a_stage(5, 95))
    assert one.others == before
    other.claim_all(Plan(6, ModelRef("m", "", "f"), (a_stage(6, 190),), Route.DIRECT, 16, 1, 1, 1), [info])
    assert one.others != before
    (left,) = one.measure_memory([replace(info, memory_limit=7, epoch=3)])
    assert (left.memory_limit, left.epoch) == (600, 3), "only the memory is measured"
    assert one.measure_memory([BOB]) == (BOB,), "who is not there any more"
    other.release(info.control_address, 6)
    assert one.others == before
