"""A leader hands over to the standby that its user named: by the coordinator's name, or by the Mac's."""

from __future__ import annotations

import pytest

from cluster.core.errors import InvalidRequest, NotServing
from cluster.core.leadership import CoordinatorName, StandbyState
from cluster.standby.heir import choose_heir

ME = CoordinatorName("mac-1-coordinator", "1")
BEHIND = StandbyState("mac-2-coordinator", problem="it is 3 updates behind")
READY = StandbyState("mac-3-coordinator", in_sync=True)


def test_the_mac_or_its_coordinator_is_named() -> None:
    for name in ("mac-3", "mac-3-coordinator", ""):
        assert choose_heir(name, ME, (BEHIND, READY), any_copy=False) is READY
    odd = StandbyState("mac-3", in_sync=True)
    assert choose_heir("mac-3", ME, (READY, odd), any_copy=False) is odd, "an exact name goes first"


def test_two_standbys_of_one_name_are_told_apart_by_what_they_have() -> None:
    assert choose_heir("mac-3", ME, (StandbyState("mac-3-coordinator"), READY), any_copy=False) is READY


def test_one_that_is_behind_takes_over_only_where_no_answers_are_lost() -> None:
    with pytest.raises(NotServing, match=r"mac-2-coordinator cannot take over .* it is 3 updates behind"):
        choose_heir("mac-2", ME, (BEHIND, READY), any_copy=False)
    assert choose_heir("mac-2", ME, (BEHIND, READY), any_copy=True) is BEHIND


def test_the_leader_itself_leads_already() -> None:
    for name in ("mac-1", "mac-1-coordinator"):
        with pytest.raises(InvalidRequest, match=r"mac-1-coordinator leads already.*standbys are mac-2-coordinator"):
            choose_heir(name, ME, (BEHIND,), any_copy=False)


def test_nobody_of_that_name_follows() -> None:
    with pytest.raises(NotServing, match=r"no standby named mac-9 follows this coordinator; standbys are mac-2-"):
        choose_heir("mac-9", ME, (BEHIND,), any_copy=False)
    with pytest.raises(NotServing, match=r"^no standby follows this coordinator; start one"):
        choose_heir("", ME, (), any_copy=False)
