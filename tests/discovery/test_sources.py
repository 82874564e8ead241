"""Static peers, merged sources and the sighting table, without a network."""

from __future__ import annotations

import time

import anyio
import pytest

from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_ROSTER
from cluster.discovery.sighting import Sighting
from cluster.discovery.sighting_table import SightingTable
from cluster.discovery.static import merge_sources, static_source

pytestmark = pytest.mark.anyio


def test_static_peers_keep_their_order_and_lose_their_doubles() -> None:
    peers = static_source(["b:2", "a:1", "b:2", "[::1]:3"])
    assert peers.current() == (Sighting("b:2"), Sighting("a:1"), Sighting("[::1]:3"))


def test_a_peer_that_is_no_address_is_refused() -> None:
    with pytest.raises(InvalidOption, match="'mac-1'"):
        static_source(["a:1", "mac-1"])


def test_more_peers_than_a_roster_holds_are_refused() -> None:
    with pytest.raises(InvalidOption, match=str(MAX_ROSTER)):
        static_source([f"a:{port}" for port in range(1, MAX_ROSTER + 2)])


async def test_static_peers_never_change() -> None:
    start = time.monotonic()
    assert await static_source(["a:1"]).changed(0.05) is False
    assert time.monotonic() - start >= 0.05


async def test_the_roster_is_bounded_and_sorted() -> None:
    roster = SightingTable()
    entered = [roster.put(f"worker {n}", Sighting(f"h:{n}", str(n), f"name {n:05}")) for n in reversed(range(10_000))]
    assert sum(entered) == MAX_ROSTER
    assert [s.name for s in roster.current()] == [f"name {n:05}" for n in range(10_000 - MAX_ROSTER, 10_000)]
    roster.forget("worker 9999")
    assert roster.put("late", Sighting("h:1", "late"))


async def test_news_is_not_lost_between_two_looks() -> None:
    roster = SightingTable()
    roster.put("a", Sighting("h:1"))
    assert await roster.changed(0)
    assert roster.current() == (Sighting("h:1"),)
    assert not await roster.changed(0)
    roster.put("a", Sighting("h:1"))
    assert not await roster.changed(0), "the same again is no news"
    roster.forget("unknown")
    assert not await roster.changed(0)
    roster.put("a", Sighting("h:2"))
    assert await roster.changed(0)


async def test_merged_takes_one_for_each_address_and_prefers_an_id() -> None:
    roster = SightingTable()
    roster.put("x", Sighting("b:2", "id", "bee"))
    roster.put("y", Sighting("c:3", "id 2", "sea"))
    both = merge_sources(static_source(["a:1", "b:2"]), roster)
    expected = (Sighting("a:1"), Sighting("b:2", "id", "bee"), Sighting("c:3", "id 2", "sea"))
    assert both.current() == expected
    assert merge_sources(roster, static_source(["b:2"])).current()[0].id == "id"


async def test_merged_hears_of_any_source() -> None:
    first, second = SightingTable(), SightingTable()
    both = merge_sources(first, static_source(["a:1"]), second)

    async def announce() -> None:
        for port in range(1000):  # until it is heard: nobody may listen yet when the first one comes
            second.put("x", Sighting(f"b:{port}"))
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        group.start_soon(announce)
        assert await both.changed(10)
        group.cancel_scope.cancel()
    assert len(both.current()) == 2
    assert not await both.changed(0.05)
