"""Discovery between hosts: three network namespaces on one Ethernet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from netns import ROOT, Host, ethernet, ip

pytestmark = pytest.mark.netns

ANNOUNCER = """
import asyncio, sys
from cluster.discovery.announce import announce

async def main(id, host):
    async with announce(id=id, name=id, version="1", cluster="lan", host=host, port=7001):
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""
BROWSER = """
import asyncio, json, sys
from cluster.discovery.browse import browse

async def main(count, wait_s):
    async with browse("lan") as source:
        while len(source.current()) < count and await source.changed(wait_s):
            pass
        print(json.dumps([[s.id, s.address] for s in source.current()]))

asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
"""


def announcer(host: Host, name: str, listen: str) -> subprocess.Popen[str]:
    return host.start(sys.executable, "-c", ANNOUNCER, name, listen, cwd=ROOT)


def browsed(host: Host, count: int, wait_s: float) -> list[list[str]]:
    found = host.run(sys.executable, "-c", BROWSER, str(count), str(wait_s), cwd=ROOT, check=True)
    assert found.stderr == ""
    return json.loads(found.stdout)


def test_workers_on_two_hosts_are_found_on_a_third(three_hosts: tuple[Host, ...]) -> None:
    a, b, c = three_hosts
    started = [announcer(a, "a", "0.0.0.0"), announcer(c, "c", c.address)]  # noqa: S104
    try:
        assert browsed(b, 2, 10) == [["a", f"{a.address}:7001"], ["c", f"{c.address}:7001"]]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_loopback_worker_stays_on_its_host(three_hosts: tuple[Host, ...]) -> None:
    a, b, _ = three_hosts
    worker = announcer(a, "a", "127.0.0.1")
    try:
        assert browsed(a, 1, 10) == [["a", "127.0.0.1:7001"]]
        assert browsed(b, 1, 2) == []
    finally:
        worker.kill()
        worker.wait()


def test_a_host_without_any_address_finds_nothing_and_goes_on(three_hosts: tuple[Host, ...]) -> None:
    a, _, _ = three_hosts
    ip("-n", a.namespace, "link", "set", "eth0", "down")
    ip("-n", a.namespace, "addr", "flush", "dev", "eth0")
    ip("-n", a.namespace, "addr", "flush", "dev", "lo")
    ip("-n", a.namespace, "link", "set", "lo", "down")
    found = a.run(sys.executable, "-c", BROWSER, "1", "0.5", cwd=ROOT)
    assert (found.returncode, found.stdout) == (0, "[]\n")
    assert "multicast: not available" in found.stderr
    assert "purpose=look for workers" in found.stderr
    assert "Traceback" not in found.stderr


SERVER = """
import socket
server = socket.create_server(("", 7001))
print("up", flush=True)
while True:
    server.accept()[0].close()
"""
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], 7001), timeout=1).close()"


def test_a_pulled_cable_cuts_a_host_off(three_hosts: tuple[Host, ...]) -> None:
    a, b, _ = three_hosts
    with b.start(sys.executable, "-c", SERVER, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        knock = (sys.executable, "-c", KNOCK, b.address)
        assert a.run(*knock).returncode == 0
        b.unplug()
        assert "TimeoutError" in a.run(*knock).stderr
        b.plug()
        assert a.run(*knock).returncode == 0
        server.kill()


def test_namespaces_go_with_all_that_ran_in_them(three_hosts: tuple[Host, ...]) -> None:
    with ethernet(2) as hosts:
        worker = hosts[0].start("sleep", "60")
        hosts[1].run("true", check=True)
        assert hosts[1].port in ip("-n", hosts[1].switch, "-o", "link")
        assert hosts[1].port not in ip("-o", "link"), "it shows among the machine's own interfaces"
    assert worker.wait(5) == -9
    left = ip("netns", "list")
    assert three_hosts[0].namespace in left
    assert not any(host.namespace in left or host.switch in left for host in hosts)
