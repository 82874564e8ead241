"""Daemons of a careless parent: signals ignored or blocked, streams closed, few files, no working folder."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.client import Client
from integration.daemons import Cluster, Footprint, alive, bound, children, free_port, gone, wait_serving, watchdog_pipe

pytestmark = pytest.mark.timeout(180)
Prepare = Callable[[], object]
MANY = 5000
"""More open files than mlx-lm would leave."""


def ignore(*numbers: signal.Signals) -> Prepare:
    return lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers]


def block(*numbers: signal.Signals) -> Prepare:
    return lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def some_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, MANY))


def no_folder() -> None:
    os.mkdir("gone")  # noqa: PTH102  # pathlib's need more of Python than a forked process may use
    os.chdir("gone")
    os.rmdir("../gone")  # noqa: PTH106


def no_umask() -> None:
    os.umask(0)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
EVERYTHING = (ignore(*SIGNALS), block(*SIGNALS), few_files, no_folder, no_umask)


def careless(*prepare: Prepare) -> Callable[[Sequence[str], Path], subprocess.Popen[bytes]]:
    """Start a ``macpipe`` process from a parent that has prepared itself in these ways."""

    def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        def before() -> None:
            for one in prepare:
                one()

        with log.open("wb") as out:
            return subprocess.Popen(
                bound(*arguments),
                stdin=watchdog_pipe(),
                stdout=out,
                stderr=out,
                cwd=log.parent,
                preexec_fn=before,
                start_new_session=True,
            )

    return launch


def test_daemons_work_and_end_however_carelessly_they_were_started(cluster: Cluster, llama: Path) -> None:
    worker = cluster.worker("solo", launch=careless(*EVERYTHING))
    worker.wait_for("worker solo of cluster")
    port = free_port()
    serve = cluster.serve(llama, "--port", str(port), launch=careless(some_files, ignore(signal.SIGINT), no_umask))
    wait_serving(f"127.0.0.1:{port}", serve)
    assert resource.prlimit(serve.process.pid, resource.RLIMIT_NOFILE) == (MANY, MANY)
    with Client(f"127.0.0.1:{port}", timeout_s=60) as client:
        expected = client.generate([1, 2, 3], max_tokens=4, ignore_eos=True).tokens
        (engine,) = children(worker.process.pid)
        os.kill(engine, signal.SIGKILL)
        worker.wait_for("the engine was ended by SIGKILL")
        assert client.generate([1, 2, 3], max_tokens=4, ignore_eos=True).tokens == expected
    homes = (cluster.folder / "home", cluster.folder / "coordinator")
    assert [p for home in homes for p in (home, *home.rglob("*")) if p.stat().st_mode & 0o077] == []
    left = children(worker.process.pid)
    assert serve.stop(signal.SIGINT) == 0
    assert worker.stop(signal.SIGTERM, 30) == 0
    assert all(gone(pid, 5) for pid in left)
    assert "Traceback" not in worker.said() + serve.said()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("prepare", EVERYTHING)
def test_no_single_carelessness_keeps_a_worker_from_ending(cluster: Cluster, prepare: Prepare, number: int) -> None:
    worker = cluster.worker("solo", launch=careless(prepare))
    worker.wait_for("worker solo of cluster")
    assert worker.stop(number, 30) == 0
    assert "Traceback" not in worker.said()


@pytest.mark.long
def test_a_worker_without_standard_streams_takes_nothing_else_for_them(cluster: Cluster) -> None:
    def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            bound(*arguments)[:-1], preexec_fn=lambda: os.closerange(0, 3), start_new_session=True, cwd=log.parent
        )

    worker = cluster.worker("solo", launch=launch)
    serve = cluster.serve("faq", "--workers", "1", "--port", "0")
    serve.wait_for("serving")
    assert Footprint.of(worker.process.pid).files > 3
    assert all(str(Path(f"/proc/{worker.process.pid}/fd/{number}").readlink()) == os.devnull for number in range(3))
    assert alive(worker.process.pid)
    assert worker.stop() == 0
