"""Real workers measure themselves, are planned by their profiles, and learn from their frames."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make
from cluster.client import Client, ModelPlan
from cluster.core.limits import CORRECTION_BOUND, LEARN_S, LEARN_SHARE
from integration.daemons import Cluster, command, until


def kept(cluster: Cluster, worker: str) -> Any:
    return json.loads((cluster.folder / "home" / "workers" / worker / "profile.json").read_text())


@pytest.mark.timeout(180)
def test_the_faster_worker_is_taken_and_its_frames_teach_it(cluster: Cluster, tmp_path: Path) -> None:
    for name, throttle in (("hare", "1"), ("tortoise", "8")):
        worker = cluster.worker(name, "--profile", "kept", "--throttle", throttle)
        worker.wait_for(f"worker {name} of cluster")  # one after another: they share this machine
    assert kept(cluster, "hare")["profile"]["bandwidth"] > 2 * kept(cluster, "tortoise")["profile"]["bandwidth"]
    model = make("llama_4bit", tmp_path / "llama")
    serve, address = cluster.serving(model, 2)  # on a busy machine one may answer seconds after the other
    with Client(address, timeout_s=60) as client:
        client.unload()  # else the layers stay where they are
        for _ in client.load(str(model)):
            pass
        state = client.cluster()
        assert [s.worker for s in state.stages] == ["hare"]
        assert [s.worker for s in state.spares] == ["tortoise"]
        assert state.stages[0].predicted_ms > 0
        assert state.stages[0].measured_ms == 0, "nothing has been decoded yet"
        client.generate([5, 6, 7], max_tokens=40, ignore_eos=True)
        (stage,) = client.cluster().stages
        assert stage.measured_frames >= 40
        assert stage.measured_ms > 0
        assert stage.expected_ms > 0
        both = client.plan(state.model, workers=2)
        assert {s.worker for s in both.stages} == {"hare", "tortoise"}
        assert len(kept(cluster, "hare")["links"]) == 1, "a plan over two measures the links between them"
        corrected = learned(client, state.model, stage.predicted_ms)
        assert corrected.stages[0].worker == "hare"
    ((_, ratio),) = kept(cluster, "hare")["profile"]["corrections"]
    said = stage.measured_ms / stage.expected_ms
    assert ratio == pytest.approx(min(max(said, 1 / CORRECTION_BOUND), CORRECTION_BOUND) ** LEARN_SHARE, rel=0.5)
    assert "spare: tortoise" in serve.said()


def learned(client: Client, model: str, before_ms: float) -> ModelPlan:
    """Return the plan once the worker knows its frames' times."""
    deadline = time.monotonic() + 3 * LEARN_S
    while True:
        plan = client.plan(model)
        if plan.stages[0].predicted_ms != before_ms:
            return plan
        assert time.monotonic() < deadline, "nothing was learned"
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_that_starts_beside_two_busy_loops_does_not_skew_the_plan(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("ada", "bob"):
        cluster.worker(name, "--profile", "kept").wait_for(f"worker {name} of cluster")
    with ExitStack() as busy:
        for _ in range(2):
            loop = busy.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            busy.callback(loop.kill)
        cluster.worker("cyd", "--profile", "kept").wait_for("worker cyd of cluster")
    model = make("llama_4bit", tmp_path / "llama", layers=12)
    _, address = cluster.serving(model, 3)
    with Client(address, timeout_s=60) as client:
        stages = client.plan(client.cluster().model, workers=3).stages
    assert {stage.worker for stage in stages} == {"ada", "bob", "cyd"}
    assert is_even([len(stage.layers) for stage in stages])


def is_even(layers: Sequence[int]) -> bool:
    return all(abs(own - sum(layers) / len(layers)) <= 1 for own in layers)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_equal_workers_stay_even_once_their_frames_were_measured(cluster: Cluster) -> None:
    """After a benchmark and a restart of all, and after the loss of one, though frames differ by some percent."""
    workers = {name: cluster.worker(name, "--profile", "kept") for name in ("ada", "bob", "cyd")}
    for name, worker in workers.items():
        worker.wait_for(f"worker {name} of cluster")
    serve, address = cluster.serving("faq", 3)
    bench = ("bench", "--coordinator", address, "--prompt", "100", "--users", "1,2", "--rounds", "1")
    subprocess.run(command(*bench), check=True, timeout=200)
    until(lambda: all(kept(cluster, name)["profile"]["corrections"] for name in workers), 3 * LEARN_S)
    for daemon in (serve, *workers.values()):
        daemon.stop(timeout_s=30)
    workers = {name: cluster.worker(name, "--profile", "kept") for name in workers}
    _, address = cluster.serving("faq", 3)
    with Client(address, timeout_s=60) as client:
        stages = client.cluster().stages
        assert {stage.worker for stage in stages} == workers.keys()
        assert is_even([len(stage.layers) for stage in stages]), profiles(cluster, workers)
        workers[stages[1].worker].stop(signal.SIGKILL)
        client.generate([5, 6, 7], max_tokens=20, ignore_eos=True)
        stages = client.cluster().stages
        assert len(stages) == 2
        assert is_even([len(stage.layers) for stage in stages]), profiles(cluster, workers)


def profiles(cluster: Cluster, workers: Iterable[str]) -> str:
    return json.dumps({name: kept(cluster, name) for name in workers})
