"""Two hosts with a slow and a fast cable: links and groups use the fast one, links the slow one once that is cut."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.core.link_limits import LINKS_S
from integration.daemons import START_S, Cluster, command, until
from integration.test_three_hosts import macpipe, on
from netns import Host

pytestmark = [pytest.mark.netns, pytest.mark.long, pytest.mark.timeout(600)]
ANSWER = ("-p", "hello there", "--raw", "--max-tokens", "300", "--ignore-eos", "--coordinator", "127.0.0.1:7700")


@pytest.fixture
def cluster(two_cabled_hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """`init` on the first host, `join` on the second, and a worker on each; where to listen is left to them."""
    first, second = two_cabled_hosts
    made = Cluster(tmp_path, mtls=False)
    homes = {"near": tmp_path / "coordinator", "far": tmp_path / "far"}
    monkeypatch.setenv("MACPIPE_HOME", str(homes["near"]))
    monkeypatch.setenv("MACPIPE_CLUSTER", made.name)
    try:
        init = ("init", "--macs", "1", "--name", "near", "--cluster", made.name, "--json")
        with first.start(*command(*init), stdout=subprocess.PIPE) as leading:
            assert leading.stdout
            (token,) = [token["token"] for token in json.loads(leading.stdout.readline())["tokens"]]
            own = ("--name", "far", "--home", str(homes["far"]), "--cluster", made.name)
            done = second.run(*command("join", token, *own), timeout=60)
            assert done.returncode == 0, done.stderr
            assert leading.wait(30) == 0
        for host, (name, home) in zip(two_cabled_hosts, homes.items(), strict=True):
            made.worker(name, "--home", str(home), "--profile", "kept", launch=on(host))
        yield made
    finally:
        made.close()


def test_the_fast_cable_is_used_and_the_slow_one_once_it_is_cut(
    two_cabled_hosts: tuple[Host, Host], cluster: Cluster, llama: Path
) -> None:
    first, second = two_cabled_hosts
    serve = cluster.serve(llama, "--workers", "2", "--layers", "0-1,2-3", "--wait", str(START_S), launch=on(first))
    serve.wait_for("serving")
    workers: Any = macpipe(first, "status")["workers"]
    assert {w["data_address"].rpartition(":")[0] for w in workers} == {first.address, second.address}
    assert stages_of(first)[1]["link_interface"] == "eth1"
    whole = first.run(*command("generate", *ANSWER), timeout=200).stdout
    log = cluster.folder / "answer.log"
    with log.open("wb") as out:
        asking = first.start(*command("generate", *ANSWER), stdout=out)
    until(lambda: log.stat().st_size)
    first.unplug()
    assert asking.wait(200) == 0
    assert log.read_text() == whole
    near, far = stages_of(first)
    assert (near["worker"], far["worker"]) in {("near", "far"), ("far", "near")}
    assert far["input_route"] == "direct"
    assert far["link_interface"] == "eth0"
    first.plug()
    until(lambda: stages_of(first)[1]["link_interface"] == "eth1", 2 * LINKS_S + START_S)  # nobody waits for an answer
    assert first.run(*command("generate", *ANSWER), timeout=200).stdout == whole


def test_a_group_meets_over_the_fast_cable_to_measure_and_to_serve(
    two_cabled_hosts: tuple[Host, Host], cluster: Cluster, llama: Path
) -> None:
    first, second = two_cabled_hosts
    group = ("--group", "near+far", "--insecure-links", "near+far")
    serve = cluster.serve(llama, *group, "--wait", str(START_S), launch=on(first))
    serve.wait_for("serving")
    told = re.findall(r"group: told a rank.* backend=(\w+) hosts=(\S+)", serve.said())
    assert [backend for backend, _ in told] == ["ring"] * 4, "two ranks, for the sums and for the load"
    hosts = {host.rpartition(":")[0] for _, both in told for host in both.split(",")}
    assert len(hosts) == 2
    assert not hosts & {first.address, second.address}
    assert first.run(*command("generate", *ANSWER), timeout=200).returncode == 0


def stages_of(host: Host) -> Any:
    return macpipe(host, "status")["stages"]
