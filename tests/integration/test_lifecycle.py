"""Workers come and go: clean stops, no orphans, a stable id, and a crash that ends only one process."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from cluster.client import Client
from cluster.coordinator.identity import state_folder
from cluster.core.errors import MacpipeError, ModelNotFound, NoPlan, WorkerLost
from effort import effort
from integration.daemons import START_S, Cluster, Footprint, alive, children, gone, wait_serving

pytestmark = pytest.mark.timeout(180)

STOP_S = 3.0
DAY_MS = 86_400_000
TIGHT = "1MiB"
"""Too little for the whole model, enough for half of it."""


def engine_of(pid: int) -> int:
    (engine,) = children(pid)
    return engine


def with_standby(pid: int) -> list[int]:
    """A daemon's engine and its standby, once that is there."""
    deadline = time.monotonic() + START_S
    while len(found := children(pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_stops_cleanly_and_leaves_no_orphan(cluster: Cluster, number: int) -> None:
    worker = cluster.worker("solo")
    worker.wait_for("worker solo of cluster")
    engine = engine_of(worker.process.pid)
    began = time.monotonic()
    assert worker.stop(number) == 0
    assert gone(engine, max(0.0, began + STOP_S - time.monotonic()))
    assert "Traceback" not in worker.said()


def test_an_engine_ends_with_its_daemon_even_when_that_is_killed(cluster: Cluster) -> None:
    worker = cluster.worker("solo")
    worker.wait_for("worker solo of cluster")
    engine = engine_of(worker.process.pid)
    worker.stop(signal.SIGKILL)
    assert gone(engine, STOP_S)


def test_a_worker_keeps_its_id_over_restarts(cluster: Cluster) -> None:
    ids = []
    for _ in range(2):
        worker = cluster.worker("solo")
        worker.wait_for("worker solo of cluster")
        ids.append((cluster.folder / "home" / "workers" / "solo" / "id").read_text())
        worker.stop()
    assert ids[0] == ids[1] != ""


def test_a_model_that_fits_no_more_is_served_again_once_the_worker_is_back(cluster: Cluster, llama: Path) -> None:
    """The other processes live on; the request ends once, with a sentence that names the Mac and what is missing."""
    workers = [cluster.worker(name, "--memory-limit", TIGHT) for name in ("one", "two")]
    serve, address = cluster.serving(llama, 2)
    with Client(address, timeout_s=30) as client:
        stream = client.stream([1, 2, 3], max_tokens=1500, ignore_eos=True)
        tokens = iter(stream)
        next(tokens)
        workers[0].stop(signal.SIGKILL)
        with pytest.raises(WorkerLost, match=r"one.*lacks .* [KM]iB"):
            list(tokens)
        assert client.cluster().state == "failed"
        assert "one" in client.cluster().problem
        repair = client.cluster().repair
        assert repair
        assert repair.doing.startswith("waiting for a Mac")
        assert {w.name: w.reachable for w in client.cluster().workers} == {"one": False, "two": True}
        with pytest.raises(MacpipeError, match="one"):
            client.generate([1, 2, 3])
        workers.append(cluster.worker("one", "--memory-limit", TIGHT))
        wait_serving(address, serve)
        assert client.generate([1, 2, 3], max_tokens=5, ignore_eos=True).finish_reason == "length"
    assert serve.stop(signal.SIGINT) == 0
    assert "Traceback" not in serve.said() + workers[0].said() + workers[1].said()


def test_an_engine_that_crashes_is_reported_and_restarted_and_the_answer_goes_on(cluster: Cluster, llama: Path) -> None:
    workers = [cluster.worker("one"), cluster.worker("two", "--standby")]
    _, address = cluster.serving(llama, 2)
    with Client(address, timeout_s=60) as client:
        before = client.generate([1, 2, 3], max_tokens=5, ignore_eos=True).tokens
        crashed, standby = with_standby(workers[1].process.pid)
        os.kill(crashed, signal.SIGSEGV)
        workers[1].wait_for("SIGSEGV", 10)
        assert client.generate([1, 2, 3], max_tokens=5, ignore_eos=True).tokens == before
        state = client.cluster()
        assert (state.state, state.recoveries) == ("serving", 1)
        loaded = state.events[0]
        recovered = next(event for event in state.events if event.kind == "recovery")
        assert (loaded.kind, loaded.sentence) == ("load", f"loaded {state.model}")
        assert (recovered.worker, "serving again" in recovered.sentence) == ("two", True)
        assert loaded.age_seconds > recovered.age_seconds + recovered.duration_seconds > 0
        assert [s.worker for s in state.stages] in (["one", "two"], ["one"])  # a slow machine's engine comes too late
        assert {w.name: w.losses for w in state.workers} == {"one": 0, "two": 1}
        assert alive(workers[1].process.pid)
        assert children(workers[1].process.pid)[0] == standby != crashed
        last = with_standby(workers[1].process.pid)
        client.unload()
        idle = client.cluster()
        assert (idle.recoveries, idle.events[-1].kind, idle.events[-1].sentence) == (
            1,
            "unload",
            f"unloaded {state.model}",
        )
    workers[1].stop(signal.SIGKILL)
    assert all(gone(pid, 5 * STOP_S) for pid in last)  # one at its imports ends after them


def test_a_coordinator_that_stops_frees_its_workers(cluster: Cluster, llama: Path) -> None:
    worker = cluster.worker("solo")
    for _ in range(2):
        serve, address = cluster.serving(llama, 1)
        with Client(address, timeout_s=30) as client:
            assert client.cluster().workers[0].memory_used > 100_000
        began = time.monotonic()
        assert serve.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < STOP_S
    assert worker.process.poll() is None


def test_a_second_coordinator_does_not_take_workers_that_serve(cluster: Cluster, llama: Path) -> None:
    cluster.worker("solo")
    kept = state_folder(cluster.folder / "coordinator", cluster.name) / "epoch"
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    ahead = time.time_ns() // 1_000_000 + DAY_MS
    kept.write_text(f"{ahead}\n")
    first, address = cluster.serving(llama, 1)
    with Client(address, timeout_s=120) as client:
        stream = client.stream([1, 2, 3], max_tokens=1800, ignore_eos=True)
        tokens = iter(stream)
        next(tokens)
        second = cluster.serve(llama, "--workers", "1", "--port", "0", "--wait", "4")
        copy = cluster.folder / "copy"
        shutil.copytree(cluster.folder / "coordinator", copy)
        clone = cluster.serve(llama, "--workers", "1", "--port", "0", "--wait", "60", "--home", str(copy))
        assert second.process.wait(60) == 1
        assert "for another coordinator" in second.said()
        assert clone.process.wait(60) == 1
        assert "has the id of this one" in clone.said()
        assert next(tokens).index == 1
        stream.cancel()
        assert client.generate([1, 2, 3], max_tokens=4, ignore_eos=True).finish_reason == "length"
    first.stop(signal.SIGKILL)
    kept.unlink()  # as if the clock had gone back a day while the coordinator was down, and its file was lost
    _, address = cluster.serving(llama, 1)
    with Client(address, timeout_s=60) as client:
        assert client.generate([1, 2, 3], max_tokens=4, ignore_eos=True).finish_reason == "length"
        assert client.cluster().epoch > ahead


@pytest.mark.long
def test_a_coordinator_that_wakes_up_finds_its_worker_taken_and_disturbs_nobody(cluster: Cluster, llama: Path) -> None:
    worker = cluster.worker("solo")
    first, address = cluster.serving(llama, 1)
    with Client(address, timeout_s=120) as asleep:
        tokens = iter(asleep.stream([1, 2, 3], max_tokens=1800, ignore_eos=True))
        next(tokens)
        first.process.send_signal(signal.SIGSTOP)
        home = str(cluster.folder / "other")
        second, taken = cluster.serving(llama, 1, "--home", home)
        with Client(taken, timeout_s=120) as client:
            expected = client.generate([1, 2, 3], max_tokens=20, ignore_eos=True).tokens
            first.process.send_signal(signal.SIGCONT)
            first.wait_for("for another coordinator", 60)
            for _ in range(5):
                assert client.generate([1, 2, 3], max_tokens=20, ignore_eos=True).tokens == expected
            assert client.cluster().recoveries == 0
        first.stop(signal.SIGKILL)
    worker.stop(signal.SIGKILL)
    cluster.worker("solo")
    second.wait_for("serving again", 60)
    with Client(taken, timeout_s=60) as client:
        assert client.generate([1, 2, 3], max_tokens=20, ignore_eos=True).tokens == expected


def test_a_load_that_cannot_be_leaves_the_served_model_alone(cluster: Cluster, llama: Path) -> None:
    cluster.worker("solo")
    serve, address = cluster.serving(llama, 1)
    with Client(address, timeout_s=60) as client:
        stream = client.stream([1, 2, 3], max_tokens=1500, ignore_eos=True)
        tokens = iter(stream)
        next(tokens)
        with pytest.raises(NoPlan, match="layers 0-7"):
            client.load("faq", workers=1, layers="0-8").wait()
        with pytest.raises(ModelNotFound):
            client.load("no-such-model").wait()
        assert next(tokens).index == 1
        assert client.cluster().model == str(llama)
        threads = [Footprint.of(serve.process.pid).threads]
        for _ in range(effort(3, 6)):
            client.load(str(llama), workers=1).wait()
            threads.append(Footprint.of(serve.process.pid).threads)
        assert threads[-1] <= threads[1] + 2, threads


def test_a_host_off_this_machine_is_refused_without_a_cluster(cluster: Cluster) -> None:
    for host in ("192.0.2.77", "no-such-host.invalid"):
        worker = cluster.worker("solo", "--host", host)
        assert worker.process.wait(60) == 2
        assert host in worker.said()
        assert "macpipe init" in worker.said()
        assert "Traceback" not in worker.said()
