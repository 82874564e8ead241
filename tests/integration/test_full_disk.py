"""Full disks under real daemons: nothing hangs or is half written, and all continues once there is room."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.client import Client
from disks import SmallDisk
from integration.daemons import START_S, Cluster, bound, children, free_port, until, wait_serving, watchdog_pipe

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
        until(lambda: not client.cluster().warnings)
    assert "Traceback" not in serve.said()


def test_a_coordinator_starts_serves_and_recovers_on_a_disk_that_is_full(
    cluster: Cluster, llama: Path, small_disk: SmallDisks
) -> None:
    """Its state, its journal and its log are on that disk; the worker's are not."""
    disk = small_disk(cluster.folder / "coordinator", MIB)

    def launch_full(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with (disk.path / "log").open("wb") as out:
            disk.fill()
            return subprocess.Popen(
                bound(*arguments), stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True
            )

    worker = cluster.worker("solo")
    port = free_port()
    serve = cluster.serve(llama, "--port", str(port), "--journal", "second", launch=launch_full)
    serve.log.write_text("its log is on the full disk")
    wait_serving(f"127.0.0.1:{port}", serve)
    with Client(f"127.0.0.1:{port}", timeout_s=60) as client:
        expected = client.generate([1, 2, 3], max_tokens=20, ignore_eos=True).tokens
        assert "No space left on device" in client.cluster().warnings[0]
        stream = client.stream([1, 2, 3], max_tokens=20, ignore_eos=True)
        tokens = iter(stream)
        begun = [next(tokens).token]
        os.kill(children(worker.process.pid)[0], signal.SIGKILL)
        assert tuple(begun + [token.token for token in tokens]) == expected
        disk.free()
        until(lambda: not client.cluster().warnings)
    assert serve.stop() == 0
    assert (disk.path / "coordinators" / cluster.name / "journal").is_file()


@pytest.mark.long
def test_a_worker_on_a_full_disk_says_so_and_starts_once_there_is_room(
    cluster: Cluster, small_disk: SmallDisks
) -> None:
    disk = small_disk(cluster.folder / "home", MIB)
    disk.fill()
    refused = cluster.worker("solo")
    assert refused.process.wait(START_S) == 2
    assert "No space left on device" in refused.said()
    assert "Traceback" not in refused.said()
    disk.free()
    cluster.worker("solo").wait_for("worker solo of cluster")
