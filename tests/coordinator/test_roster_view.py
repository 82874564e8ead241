"""What one holder of slices sees of the roster, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

from cluster.coordinator.roster import Roster
from cluster.coordinator.roster_view import RosterView
from cluster.core.worker import WorkerInfo
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
