"""The join port over Zeroconf: found by the cluster's id, among impostors."""

from __future__ import annotations

import secrets
import time

import anyio
import pytest
from zeroconf import DNSAddress, DNSPointer, DNSService, DNSText, ServiceStateChange, const
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from cluster.core.errors import ForeignAuthority, MacpipeError, Unreachable
from cluster.core.limits import MAX_ROSTER
from cluster.discovery import browse as browse_module
from cluster.discovery.coordinator_announcement import (
    JOIN_SERVICE,
    announce_join,
    look_for_coordinator,
    read_coordinator_sighting,
)
from cluster.discovery.sighting_table import SightingTable
from cluster.joining.coordinator_search import search
from cluster.security.limits import JOIN_TRIES, MAX_JOIN_TRIED

pytestmark = pytest.mark.anyio
SOON_S = 15


@pytest.fixture
def cluster_id() -> str:
    return secrets.token_hex(8)


async def found(cluster_id: str, wait_s: float) -> list[str]:
    async with look_for_coordinator(cluster_id, JOIN_SERVICE) as source:
        end = time.monotonic() + wait_s
        while not (now := source.current()) and time.monotonic() < end:
            await source.changed(end - time.monotonic())
        return [sighting.address for sighting in now]


async def test_a_join_port_is_found_by_its_clusters_id(cluster_id: str) -> None:
    async with announce_join(cluster="lab", cluster_id=cluster_id, host="127.0.0.1", port=7701):
        assert await found(cluster_id, SOON_S) == ["127.0.0.1:7701"]
        assert await found(secrets.token_hex(8), 0.5) == []


async def test_an_announcement_says_nothing_but_the_cluster(cluster_id: str) -> None:
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
    try:
        async with announce_join(cluster="lab", cluster_id=cluster_id, host="127.0.0.1", port=7701):
            heard = SightingTable()
            said: list[dict[bytes, bytes | None]] = []

            def read(
                info: AsyncServiceInfo, local: tuple[browse_module.Interface, ...]
            ) -> browse_module.Sighting | None:
                sighting = read_coordinator_sighting(info, local)
                if sighting and sighting.cluster == cluster_id:
                    said.append(dict(info.properties))
                return sighting

            listener = browse_module._Listener(zeroconf, cluster_id, heard, JOIN_SERVICE, read)
            async with browse_module.alongside(listener.run()):
                with anyio.fail_after(SOON_S):
                    while not said:
                        await heard.changed(SOON_S)
        assert said[0] == {b"cluster": b"lab", b"id": cluster_id.encode()}
    finally:
        await zeroconf.async_close()


def records(label: str, cluster_id: str, port: int) -> list[DNSPointer | DNSService | DNSText | DNSAddress]:
    name, server, ttl = f"{label}.{JOIN_SERVICE}", f"{label}.local.", 120
    said = AsyncServiceInfo(JOIN_SERVICE, name, properties={b"cluster": b"lab", b"id": cluster_id.encode()})
    return [
        DNSPointer(JOIN_SERVICE, const._TYPE_PTR, const._CLASS_IN, ttl, name),
        DNSService(name, const._TYPE_SRV, const._CLASS_IN, ttl, 0, 0, port, server),
        DNSText(name, const._TYPE_TXT, const._CLASS_IN, ttl, said.text),
        DNSAddress(server, const._TYPE_A, const._CLASS_IN, ttl, b"\x7f\0\0\1"),
    ]


async def test_ten_thousand_strangers_are_tried_a_few_at_a_time_and_not_for_ever(cluster_id: str) -> None:
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
    roster, open_now, most, tried = SightingTable(), 0, 0, set()

    async def look(address: str) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        tried.add(address)
        await anyio.sleep(0.001)
        open_now -= 1
        raise ForeignAuthority(f"{address} is another")

    try:
        listener = browse_module._Listener(zeroconf, cluster_id, roster, JOIN_SERVICE, read_coordinator_sighting)
        for number in range(10_000):
            whose = cluster_id if number % 2 else secrets.token_hex(8)
            zeroconf.zeroconf.cache.async_add_records(records(f"flood{number}", whose, 1000 + number))
            listener._on_change(
                zeroconf.zeroconf, JOIN_SERVICE, f"flood{number}.{JOIN_SERVICE}", ServiceStateChange.Added
            )
        assert len(roster.current()) == MAX_ROSTER
        with pytest.raises(ForeignAuthority) as ended:
            await search(roster, look, cluster_id, 0.5)
        assert ended.value.sentence == (
            f"64 addresses claim to be cluster {cluster_id}, but none of them proved it in 0 s; no secret was sent;"
            " name its coordinator with --peer HOST:PORT"
        )
        assert len(tried) == MAX_ROSTER < MAX_JOIN_TRIED
        assert most == JOIN_TRIES
    finally:
        await zeroconf.async_close()


async def test_the_one_that_proves_itself_wins_among_strangers(cluster_id: str) -> None:
    roster = SightingTable()
    for number in range(30):
        roster.put(f"{number}", browse_module.Sighting(f"127.0.0.1:{9000 + number}"))

    async def look(address: str) -> str:
        if address == "127.0.0.1:9029":
            return address
        await anyio.sleep(0.01)
        raise Unreachable("closed")

    assert await search(roster, look, cluster_id, 5) == "127.0.0.1:9029"


async def test_a_search_that_finds_nobody_says_what_to_do(cluster_id: str) -> None:
    async def look(_: str) -> MacpipeError:
        raise AssertionError

    with pytest.raises(Unreachable, match=rf"cluster {cluster_id} was found in .*macpipe serve.*--peer HOST:PORT"):
        await search(SightingTable(), look, cluster_id, 0.05)
