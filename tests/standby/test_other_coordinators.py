"""Coordinators that tell each other who leads: the lower term gives way, and a restarted one finds the leader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.core.errors import Unreachable
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim, LeadershipState, StandbyState
from cluster.core.limits import GONE_S, REMEMBER_S
from cluster.standby.other_coordinators import MAX_ADDRESSES, MAX_COORDINATORS, OtherCoordinators


class Network:
    """Coordinators by their addresses. Those that are ``gone`` do not answer."""

    def __init__(self, *names: str, folder: Path | None = None) -> None:
        self.gone: set[str] = set()
        self.now = 0.0
        self.folder = folder
        self.all = {f"{name}:7700": self.start(name) for name in names}

    def start(self, name: str, instance: str = "1") -> OtherCoordinators:
        me = CoordinatorName(name, f"{name}-{instance}", (f"{name}:7700",))
        return OtherCoordinators(me, self._ask, self.folder / name if self.folder else None, lambda: self.now)

    async def _ask(self, address: str, claim: LeaderClaim) -> LeaderClaim:
        if address in self.gone or address not in self.all:
            raise Unreachable(f"no answer from {address}")
        return self.all[address].hear(claim)


@pytest.mark.anyio
async def test_a_leader_gives_way_to_a_higher_term_and_no_other() -> None:
    network = Network("ada", "bob", "cyd")
    ada, bob, cyd = network.all.values()
    ada.lead(3)
    bob.lead(5)
    await bob.ask("cyd:7700")
    assert cyd.leader == bob.me
    assert not ada.is_superseded
    await ada.ask("bob:7700")
    assert ada.is_superseded
    assert ada.changed.is_set()
    assert ada.leader == bob.me
    assert not bob.is_superseded
    assert [claim.coordinator for claim in bob.others.values()] == [ada.me], "two services are named until one ends"
    ada.stand_by()
    await ada.ask("bob:7700")
    assert not bob.others
    ada.lead(4)
    assert ada.is_superseded, "a term that is lower than the other's does not lead"
    ada.lead(6)
    assert not ada.is_superseded


@pytest.mark.anyio
async def test_a_leader_without_a_term_yet_gives_way_to_one_that_has_one() -> None:
    network = Network("ada", "bob")
    ada, bob = network.all.values()
    bob.lead(1)
    ada.lead(0)
    await bob.ask("ada:7700")
    assert ada.is_superseded
    assert not bob.is_superseded


@pytest.mark.anyio
async def test_who_leads_is_found_over_those_that_know_it_and_believed_only_of_itself() -> None:
    network = Network("ada", "bob", "cyd")
    ada, bob, cyd = network.all.values()
    cyd.lead(7)
    await cyd.ask("bob:7700")
    assert await ada.find_leader(["gone:1", "bob:7700"]) == cyd.me
    assert ada.term == 7
    assert set(ada.addresses) == {"bob:7700", "cyd:7700"}
    network.gone.add("cyd:7700")
    assert bob.leader == cyd.me
    assert await ada.find_leader(["bob:7700"]) is None
    assert await ada.find_leader(["ada:7700"]) is None, "not itself"


@pytest.mark.anyio
async def test_a_leader_that_stands_by_is_led_by_nobody_until_somebody_leads() -> None:
    network = Network("ada", "bob")
    ada, bob = network.all.values()
    ada.lead(2)
    await bob.ask("ada:7700")
    assert bob.leader == ada.me
    ada.stand_by()
    assert ada.leader is None
    await bob.ask("ada:7700")
    assert (bob.leader, bob.term) == (None, 2)
    bob.lead(3)
    await bob.ask("ada:7700")
    assert ada.leader == bob.me


def test_addresses_survive_a_restart_within_limits(tmp_path: Path) -> None:
    network = Network("ada", folder=tmp_path)
    ada = network.all["ada:7700"]
    ada.remember([CoordinatorName("bob", "1", ("b:1",)), CoordinatorName("ada", "ada-1", ("a:1",))])
    ada.remember([CoordinatorName("cyd", "1", tuple(f"c:{i}" for i in range(99)))])
    again = network.start("ada", "2")
    assert again.addresses == (*(f"c:{i}" for i in range(MAX_ADDRESSES)), "b:1")
    again.remember([CoordinatorName("bob", "9", ("b:2",))])
    assert {"b:1", "b:2"} < set(again.addresses), "two Macs may have one name"
    again.remember(CoordinatorName(f"n{i}", str(i), (f"n{i}:1",)) for i in range(99))
    assert len(again.addresses) == MAX_COORDINATORS
    (tmp_path / "ada").write_text("{")
    assert network.start("ada", "3").addresses == ()
    assert network.start("ada", "3").claim.role is CoordinatorRole.STANDBY


@pytest.mark.anyio
async def test_a_leader_knows_for_a_while_who_does_not_follow_and_why() -> None:
    network = Network("ada", "bob", "cyd")
    ada, bob, cyd = network.all.values()
    ada.lead(3)
    assert not ada.away()
    bob.problem = "cannot follow ada: the disk is full"
    await bob.ask("ada:7700")
    ada.hear_following([cyd.me])
    assert ada.away() == (
        StandbyState("bob", ("bob:7700",), problem=bob.problem, away=True),
        StandbyState("cyd", ("cyd:7700",), problem="it has not begun to follow", away=True),
    )
    network.gone.add("cyd:7700")
    network.now += 2 * GONE_S + 1
    await ada.ask("bob:7700")
    assert await ada.find_leader(["eve:7700", "cyd:7700"]) is None
    assert [failure.sentence for failure in ada.failures] == ["no answer from eve:7700", "no answer from cyd:7700"]
    assert [(one.problem, one.silent_seconds) for one in ada.away()] == [
        (bob.problem, 0.0),
        ("it does not answer", 2 * GONE_S + 1),
    ]
    network.now = REMEMBER_S + 1
    assert [one.name for one in ada.away()] == ["bob"]
    assert [one.name for one in ada.away({"bob", "cyd"})] == ["bob", "cyd"], "a member, until it is removed"
    assert [one.name for one in ada.away({"bob"})] == ["bob"]
    bob.lead(5)
    await ada.ask("bob:7700")
    assert not ada.away()


def following(leader: OtherCoordinators, *standbys: StandbyState) -> LeadershipState:
    """What a leader tells those that follow it."""
    return LeadershipState(CoordinatorRole.LEADER, leader.term, leader.me, standbys=standbys)


@pytest.mark.anyio
async def test_the_next_leader_knows_who_was_lost_with_the_one_before_and_earlier() -> None:
    network = Network("ada", "bob", "cyd", "dan")
    ada, bob, cyd, dan = network.all.values()
    ada.lead(3)
    await bob.ask("ada:7700")
    own, beside = (StandbyState(one.me.name, one.me.addresses) for one in (bob, cyd))
    lost = StandbyState("dan", dan.me.addresses, problem="it does not answer", away=True, silent_seconds=500.0)
    bob.hear_followed(following(ada, own, beside, lost))
    network.now = 1000.0
    bob.lose(ada.me)  # its stream has ended, and it told nothing new before
    bob.lead(4)
    assert [one.problem for one in bob.away({"ada", "cyd"})] == [
        "it led before, and was not heard since",
        "it has not begun to follow",
    ]
    assert [(one.name, one.silent_seconds) for one in bob.away({"ada", "cyd", "dan"})] == [
        ("ada", 0.0),
        ("cyd", 0.0),
        ("dan", 1500.0),
    ]
    network.now += 60.0
    assert [one.silent_seconds for one in bob.away({"ada", "cyd", "dan"})] == [60.0, 60.0, 1560.0]
    bob.hear_following([cyd.me])
    ada.stand_by()
    await ada.ask("bob:7700")
    assert [(one.problem, one.silent_seconds) for one in bob.away({"ada", "cyd"})] == [
        ("it has not begun to follow", 0.0)
    ] * 2, "both are back"
    cyd.lead(5)
    await bob.ask("cyd:7700")
    cyd.stand_by()
    cyd.problem = "cannot follow bob: the disk is full"
    await bob.ask("cyd:7700")
    assert bob.away({"cyd"})[0].problem == cyd.problem
    bob.hear(LeaderClaim(replace(ada.me, addresses=("elsewhere:7700",)), CoordinatorRole.STANDBY))
    assert [one.addresses for one in bob.away({"ada"})] == [("elsewhere:7700",)]


def test_a_leader_that_starts_again_knows_who_has_not_answered_since(tmp_path: Path) -> None:
    network = Network("ada", folder=tmp_path)
    network.all["ada:7700"].remember([CoordinatorName("bob", "1", ("b:1",)), CoordinatorName("bob", "2", ("b:2",))])
    again = network.start("ada", "2")
    network.now += 30.0
    again.lead(3)
    (lost,) = again.away({"ada", "bob"})
    assert (lost.name, lost.addresses, lost.silent_seconds > 30.0) == ("bob", ("b:2",), True)
    assert not again.hears("bob")


@pytest.mark.anyio
async def test_a_leader_that_another_one_replaces_was_heard_until_then() -> None:
    network = Network("ada", "bob", "cyd")
    ada, bob, cyd = network.all.values()
    ada.lead(3)
    await bob.ask("ada:7700")
    network.now = 1000.0
    cyd.lead(4)
    await bob.ask("cyd:7700")
    network.now = 1100.0
    bob.lead(5)
    assert [(one.name, one.silent_seconds) for one in bob.away({"ada", "cyd"})] == [("ada", 100.0), ("cyd", 100.0)]
