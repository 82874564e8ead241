"""The cluster's host name: it leads to the Mac whose coordinator announces it, and soon to another one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
from zeroconf import AddressResolver, DNSAddress
from zeroconf.asyncio import AsyncZeroconf

from cluster.discovery.cluster_name import NAME_TTL_S, announce_cluster_name, cluster_host_name
from cluster.discovery.interfaces import LOOPBACK
from netns import ROOT, Host, mdns

ANNOUNCER = """
import asyncio, sys
from cluster.discovery.cluster_name import announce_cluster_name

async def main(host):
    async with announce_cluster_name("lab", host, 7700):
        print("up", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(sys.argv[1]))
"""


WAIT_S = 15
"""The records live 5 s. Starting Python takes the rest on a busy machine."""


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("cluster", "name"), [("lab", "lab.local"), ("My_Lab.2", "my-lab-2.local"), ("a" * 63, "a" * 63 + ".local")]
)
def test_a_clusters_name_becomes_a_host_name(cluster: str, name: str) -> None:
    assert cluster_host_name(cluster) == name


@pytest.mark.anyio
async def test_the_name_leads_to_the_address_that_listens() -> None:
    asker = AsyncZeroconf(interfaces=[LOOPBACK])
    try:
        async with announce_cluster_name("lab-of-tests", LOOPBACK, 7700):
            resolver = AddressResolver("lab-of-tests.local.")
            assert await resolver.async_request(asker.zeroconf, 10_000)
            assert resolver.parsed_addresses() == [LOOPBACK]
            records = asker.zeroconf.cache.entries_with_name("lab-of-tests.local.")
            assert {r.ttl for r in records if isinstance(r, DNSAddress)} == {NAME_TTL_S}
    finally:
        await asker.async_close()


@pytest.mark.netns
@pytest.mark.long
def test_a_host_that_uses_avahi_follows_the_name_to_another_leader(three_hosts: tuple[Host, ...]) -> None:
    a, b, c = three_hosts
    with (
        mdns(c) as asker,
        a.start(sys.executable, "-c", ANNOUNCER, a.address, cwd=ROOT) as first,
    ):
        try:
            wait_until(lambda: asker.addresses_of("lab.local") == [a.address])
            a.unplug()
            second = b.start(sys.executable, "-c", ANNOUNCER, b.address, cwd=ROOT)
            wait_until(lambda: asker.addresses_of("lab.local") == [b.address])
            second.kill()
            second.wait()
        finally:
            first.kill()
