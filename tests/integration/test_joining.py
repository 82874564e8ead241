"""A running coordinator admits Macs, even while it waits for workers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from integration.daemons import command, free_port
from netns import Host

HOME = "--home"


def macpipe(*arguments: str) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(port: int, serving: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 40
    while serving.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)


def test_a_coordinator_that_runs_admits(tmp_path: Path, llama: Path) -> None:
    leader, other, port = str(tmp_path / "mac-1"), str(tmp_path / "mac-2"), free_port()
    macpipe("init", "--name", "mac-1", "--macs", "0", HOME, leader)
    token = re.search(r"mpj1\.\w+", macpipe("token", "create", "--role", "client", HOME, leader))
    assert token
    ports = ("--port", "0", "--http", "off", "--join-port", str(port))
    words = command("serve", str(llama), HOME, leader, "--peers-only", "--workers", "1", "--wait", "50", *ports)
    serving = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(port, serving)
        joined = macpipe("join", token[0], "--name", "mac-2", "--peer", f"127.0.0.1:{port}", "--json", HOME, other)
        assert json.loads(joined)["name"] == "mac-2-client"
        members = json.loads(macpipe("members", "--json", HOME, leader))["members"]
        assert [one["name"] for one in members][-1] == "mac-2-client"
        record = tmp_path / "mac-1" / "clusters" / "default" / "coordinator.json"
        assert not record.exists(), "commands look for a coordinator that serves"
    finally:
        serving.kill()
        _, said = serving.communicate()
    assert b"Traceback" not in said
    assert re.search(rb"^[0-9-]{10} [0-9:]{8},\d{3} INFO join: admitted name=mac-2-client$", said, re.MULTILINE)


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_three_hosts_become_a_cluster(three_hosts: tuple[Host, ...], tmp_path: Path) -> None:
    """`init` on one, `join` on the others: found by real multicast between hosts, no --peer."""
    first, *others = three_hosts
    making = first.start(
        *command("init", "--name", "north", "--macs", "2", "--json", HOME, str(tmp_path / "north")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert making.stdout is not None
    tokens = [one["token"] for one in json.loads(making.stdout.readline())["tokens"]]
    for host, name, token in zip(others, ("south", "west"), tokens, strict=True):
        words = command("join", token, "--name", name, "--json", HOME, str(tmp_path / name))
        joined = host.run(*words, timeout=50)
        assert joined.returncode == 0, joined.stderr
        assert json.loads(joined.stdout)["coordinator"] == f"{first.address}:7701"
    _, said = making.communicate(timeout=20)
    assert making.returncode == 0
    assert [line for line in said.splitlines() if "joined" in line] == [
        "south joined as worker",
        "west joined as worker",
    ]
