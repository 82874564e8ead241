"""Announcing and browsing over real multicast on loopback. Every test uses its own cluster name."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from zeroconf import DNSAddress, DNSPointer, DNSService, DNSText, ServiceStateChange, const
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_ROSTER
from cluster.discovery import browse as browse_module
from cluster.discovery import multicast
from cluster.discovery import txt_record as txt
from cluster.discovery.announce import announce
from cluster.discovery.browse import browse
from cluster.discovery.sighting import Sighting, Source
from cluster.discovery.sighting_table import SightingTable

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[2]
SOON_S = 10

Properties = dict[str | bytes, str | bytes | None]

ANNOUNCER = """
import asyncio, sys
from cluster.discovery.announce import announce

async def main(id, name, cluster, host, port):
    async with announce(id=id, name=name, version="1", cluster=cluster, host=host, port=int(port)):
        print("up", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def cluster() -> str:
    return f"test-{uuid.uuid4().hex}"


def announced(cluster: str, id: str, name: str = "mac", port: int = 7001) -> AbstractAsyncContextManager[None]:  # noqa: A002
    return announce(id=id, name=name, version="1", cluster=cluster, host="127.0.0.1", port=port)


def seen(cluster: str, id: str, name: str = "mac", port: int = 7001) -> Sighting:  # noqa: A002
    return Sighting(f"127.0.0.1:{port}", id, name, "1", cluster)


async def until(source: Source, wanted: Callable[[tuple[Sighting, ...]], bool]) -> tuple[Sighting, ...]:
    """Return the sightings once they are as wanted; fail after SOON_S with those found instead."""
    end = time.monotonic() + SOON_S
    while not wanted(now := source.current()):
        assert time.monotonic() < end, f"still {now}"
        await source.changed(end - time.monotonic())
    return now


async def test_a_worker_is_found_and_missed_at_once_when_it_leaves(cluster: str) -> None:
    async with browse(cluster) as source:
        async with announced(cluster, "one", "Ada's Mac"):
            assert await until(source, bool) == (seen(cluster, "one", "Ada's Mac"),)
            start = time.monotonic()
        assert time.monotonic() - start < 1.0, "the goodbye takes less than a second"
        await until(source, lambda now: not now)
        assert time.monotonic() - start < 2.0


async def test_a_cancelled_worker_says_goodbye(cluster: str) -> None:
    async def work() -> None:
        async with announced(cluster, "one"):
            await anyio.sleep_forever()

    async with browse(cluster) as source:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await until(source, bool)
            group.cancel_scope.cancel()
        await until(source, lambda now: not now)


async def test_a_worker_of_another_process_is_found(cluster: str) -> None:
    argv = [sys.executable, "-c", ANNOUNCER, "one", "mac", cluster, "127.0.0.1", "7001"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    async with browse(cluster) as source:
        worker = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, **pipes)
        assert await until(source, bool) == (seen(cluster, "one"),)
        await worker.communicate(b"")
        assert worker.returncode == 0
        await until(source, lambda now: not now)


async def test_a_worker_that_was_there_before_is_found(cluster: str) -> None:
    async with announced(cluster, "one"):
        async with browse(cluster) as early:
            await until(early, bool)
        async with browse(cluster) as late:
            assert await until(late, bool) == (seen(cluster, "one"),)


async def test_clusters_are_kept_apart(cluster: str) -> None:
    other = f"{cluster}-b"
    workers = (announced(cluster, "one"), announced(other, "two", port=7002))
    async with browse(cluster) as here, browse(other) as there, workers[0], workers[1]:
        assert await until(here, bool) == (seen(cluster, "one"),)
        assert await until(there, bool) == (seen(other, "two", port=7002),)
        await here.changed(0.5)  # an address may still be announced again
        assert here.current() == (seen(cluster, "one"),)


async def test_two_of_one_name_both_appear(cluster: str) -> None:
    async with browse(cluster) as source, announced(cluster, "one"), announced(cluster, "two", port=7002):
        both = (seen(cluster, "one"), seen(cluster, "two", port=7002))
        assert await until(source, lambda now: len(now) == 2) == both


async def test_two_of_one_id_both_appear(cluster: str) -> None:
    """A copied state folder: their instance names clash, and neither crashes."""
    async with browse(cluster) as source, announced(cluster, "one"):
        await until(source, bool)
        async with announced(cluster, "one", "copy", 7002):
            both = (seen(cluster, "one", "copy", 7002), seen(cluster, "one"))
            assert await until(source, lambda now: len(now) == 2) == both


async def test_a_restart_on_another_port_is_seen(cluster: str) -> None:
    async with browse(cluster) as source:
        async with announced(cluster, "one"):
            await until(source, bool)
        async with announced(cluster, "one", port=7002):
            await until(source, lambda now: [s.address for s in now] == ["127.0.0.1:7002"])


async def test_what_cannot_be_announced_is_refused(cluster: str) -> None:
    with pytest.raises(InvalidOption, match="name"):
        async with announced(cluster, "one", "x" * 500):
            pass


async def test_what_the_block_raises_passes_through(cluster: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with announced(cluster, "one"), browse(cluster):
            raise ZeroDivisionError


class Stranger:
    """Something that announces whatever it likes under our service's type."""

    def __init__(self, zeroconf: AsyncZeroconf) -> None:
        self._zeroconf = zeroconf
        self.registry = zeroconf.zeroconf.registry

    async def __call__(self, label: str, properties: Properties, port: int = 7001, **more: Any) -> AsyncServiceInfo:
        arguments = {"parsed_addresses": ["127.0.0.1"], "server": f"{label}.local.", **more}
        name = f"{label}.{txt.SERVICE}"
        info = AsyncServiceInfo(txt.SERVICE, name, port=port, properties=properties, **arguments)
        await (await self._zeroconf.async_register_service(info, cooperating_responders=True))
        return info


@asynccontextmanager
async def stranger() -> AsyncIterator[Stranger]:
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
    try:
        yield Stranger(zeroconf)
    finally:
        await zeroconf.async_close()


def announcement(id: str, cluster: str) -> Properties:  # noqa: A002
    return {**txt.write(txt.Announcement(id, "mac", "1", cluster))}


async def test_malformed_announcements_are_passed_over(cluster: str, caplog: pytest.LogCaptureFixture) -> None:
    tag = uuid.uuid4().hex[:8]
    good = announcement("good", cluster)
    wrong: list[dict[str, Any]] = [
        {"properties": {}},
        {"properties": {**good, b"id": b"\xff\xfe"}},
        {"properties": {**good, b"name": b"\x1b[2J"}},
        {"properties": {**good, b"version": b"v" * 240}},
        {"properties": {**good, **{f"x{n}".encode(): b"y" * 200 for n in range(20)}}},
        {"properties": good, "port": 0},
        {"properties": good, "parsed_addresses": ["0.0.0.0"]},  # noqa: S104
    ]
    async with browse(cluster) as source, stranger() as say:
        for number, record in enumerate(wrong):
            await say(f"bad{number}-{tag}", **record)
        await say(f"good-{tag}", good)
        assert await until(source, bool) == (seen(cluster, "good"),)
        assert not await source.changed(0.5)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_ten_thousand_strangers_leave_the_roster_bounded(cluster: str) -> None:
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
    roster = SightingTable()
    listener = browse_module._Listener(zeroconf, cluster, roster)
    try:
        for number in range(10_000):
            label = f"flood{number}"
            zeroconf.zeroconf.cache.async_add_records(records(label, cluster, whole=number % 2 == 0))
            name = f"{label}.{txt.SERVICE}"
            listener._on_change(zeroconf.zeroconf, txt.SERVICE, name, ServiceStateChange.Added)
        assert len(roster.current()) == MAX_ROSTER
        assert listener._questions.qsize() == MAX_ROSTER
        listener._on_change(zeroconf.zeroconf, txt.SERVICE, f"flood0.{txt.SERVICE}", ServiceStateChange.Removed)
        assert len(roster.current()) == MAX_ROSTER - 1
    finally:
        await zeroconf.async_close()


def records(label: str, cluster: str, whole: bool) -> list[DNSPointer | DNSService | DNSText | DNSAddress]:
    """A worker's records; half an announcement lacks the address."""
    name, server, ttl = f"{label}.{txt.SERVICE}", f"{label}.local.", 120
    said = AsyncServiceInfo(txt.SERVICE, name, properties=announcement(label, cluster))
    pointer = DNSPointer(txt.SERVICE, const._TYPE_PTR, const._CLASS_IN, ttl, name)
    service = DNSService(name, const._TYPE_SRV, const._CLASS_IN, ttl, 0, 0, 7001, server)
    text = DNSText(name, const._TYPE_TXT, const._CLASS_IN, ttl, said.text)
    address = DNSAddress(server, const._TYPE_A, const._CLASS_IN, ttl, b"\x7f\0\0\1")
    return [pointer, service, text, address] if whole else [pointer, service, text]


async def test_who_is_gone_without_a_goodbye_is_forgotten(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records have expired, and nobody answers for them."""
    monkeypatch.setattr(browse_module, "FOLLOW_S", 0.2)
    monkeypatch.setattr(browse_module, "QUESTION_S", 0.3)
    async with browse(cluster) as source:
        async with stranger() as say:
            info = await say(f"brief-{uuid.uuid4().hex[:8]}", announcement("one", cluster), host_ttl=1, other_ttl=1)
            await until(source, bool)
            # A registry without the service says no goodbye for it.
            say.registry.async_remove(info)
        await until(source, lambda now: not now)


@pytest.mark.parametrize("error", [OSError(19, "No such device"), RuntimeError("No interfaces to listen on")])
async def test_a_machine_without_multicast_finds_nothing_and_says_so(
    cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(**_: object) -> AsyncZeroconf:
        raise error

    monkeypatch.setattr(multicast, "AsyncZeroconf", refuse)
    async with browse(cluster) as source, announced(cluster, "one"):
        assert not await source.changed(0.05)
        assert source.current() == ()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all(str(error) in warning and "--peer" in warning for warning in warnings)


async def test_an_address_that_no_interface_has_is_not_announced(
    cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with announce(id="one", name="mac", version="1", cluster=cluster, host="192.0.2.99", port=7001):
        pass
    assert "192.0.2.99" in caplog.text
