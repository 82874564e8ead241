"""Full disks under real daemons: nothing hangs, nothing is half written, and all goes on once there is room."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.client import Client
from disks import SmallDisk
from integration.daemons import START_S, Cluster

pytestmark = [pytest.mark.timeout(180), pytest.mark.small_disk]
MIB = 2**20
SmallDisks = Callable[[Path, int], SmallDisk]


def test_answers_go_on_while_the_journals_disk_is_full(cluster: Cluster, llama: Path, small_disk: SmallDisks) -> None:
    disk = small_disk(cluster.folder / "coordinator", 4 * MIB)
    cluster.worker("solo")
    serve, address = cluster.serving(llama, 1, "--journal", "always")
    with Client(address, timeout_s=60) as client:
        expected = client.generate([1, 2, 3], max_tokens=300, ignore_eos=True).tokens
        stream = client.stream([1, 2, 3], max_tokens=300, ignore_eos=True)
        tokens = iter(stream)
        begun = [next(tokens).token for _ in range(3)]
        assert not client.cluster().warnings
        disk.fill()
        assert tuple(begun + [token.token for token in tokens]) == expected
        assert client.generate([1, 2, 3], max_tokens=300, ignore_eos=True).tokens == expected
        state = client.cluster()
        assert (state.state, state.recoveries, state.requests) == ("serving", 0, ())
        assert "No space left on device" in state.warnings[0]
        disk.free()
        deadline = time.monotonic() + START_S
        while client.cluster().warnings:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "Traceback" not in serve.said()
