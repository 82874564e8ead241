"""Prompts are read from the workers' disks after a restart of everything, and by nobody else than their owner."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from checkpoints import make
from cluster.client import Client
from cluster.client.results import Completion
from integration.daemons import START_S, Cluster
from integration.reference import greedy

pytestmark = pytest.mark.timeout(180)

SIZE = "64MiB"
PROMPT = [(i * 37 + 11) % 250 for i in range(1400)]
WORKERS = ("a", "b")
NODE = 512


def start(cluster: Cluster, model: Path, size: str = SIZE) -> str:
    for name in WORKERS:
        cluster.worker(name, "--prefix-disk", size)
    return cluster.serving(model, 2)[1]


def stop(cluster: Cluster) -> None:
    for daemon in reversed(cluster.daemons):
        assert daemon.stop() == 0
    cluster.daemons.clear()


def wait_written(cluster: Cluster, end: int) -> None:
    """Wait until both workers have on disk what ends there. No later piece of a prefix is written after it."""
    for name in WORKERS:
        folder = cluster.folder / "home" / "workers" / name / "prefixes"
        pattern, deadline = f"*/*/{end:08}-*/[rs]*", time.monotonic() + START_S
        while not list(folder.glob(pattern)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ask(address: str, prompt: list[int]) -> Completion:
    with Client(address, timeout_s=60) as client:
        return client.generate(prompt, max_tokens=6, ignore_eos=True)


def test_after_a_restart_of_everything_a_prompt_comes_from_disk(cluster: Cluster, models: Path) -> None:
    hybrid = make("qwen3_next", models / "qwen3_next")
    first = ask(start(cluster, hybrid), PROMPT)
    wait_written(cluster, len(PROMPT) - 1)
    stop(cluster)
    files = list(cluster.folder.glob("home/workers/*/prefixes/**/*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.is_dir()} == {0o700}

    address = start(cluster, hybrid)
    longer = [*PROMPT, 7, 8, 9]
    again = ask(address, longer)
    assert again.usage.cached_tokens == len(PROMPT) - 1
    assert again.tokens == greedy(hybrid, longer, 6)
    assert ask(address, PROMPT).tokens == first.tokens
    with Client(address, timeout_s=60) as client:
        state = client.cluster()
    assert (state.disk_hits, state.disk_misses, state.disk_tokens) == (1, 0, len(PROMPT) - 1)
    assert all(0 < worker.prefix_disk_bytes < 2**26 for worker in state.workers)


@pytest.mark.long
def test_prefixes_outlive_the_load_of_another_model(cluster: Cluster, llama: Path, models: Path) -> None:
    address = start(cluster, llama)
    first = ask(address, PROMPT)
    with Client(address, timeout_s=60) as client:
        for model in (make("qwen3_next", models / "qwen3_next"), llama):
            for _ in client.load(str(model), workers=2):
                pass
    again = ask(address, PROMPT)
    assert again.usage.cached_tokens == len(PROMPT) // NODE * NODE
    assert again.tokens == first.tokens == greedy(llama, PROMPT, 6)


@pytest.mark.long
def test_without_the_option_nothing_stays_on_disk(cluster: Cluster, llama: Path) -> None:
    ask(start(cluster, llama), PROMPT)
    stop(cluster)
    folder = cluster.folder / "home" / "workers" / WORKERS[0] / "prefixes"
    assert list(folder.rglob("tokens"))
    cluster.worker(WORKERS[0]).wait_for("of cluster")
    assert not folder.exists()
