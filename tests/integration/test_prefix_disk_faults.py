"""Prompts on disk when something goes wrong: a revoked key, a full or read-only disk, an engine that dies in a read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest

from checkpoints import make
from cluster.api.key_usage import client_of
from cluster.client import Client
from cluster.core.prefix_keys import owner_key
from cluster.security.keys import KeyStore
from cluster.store.limits import DISK_MARGIN_BYTES
from disks import SmallDisk
from integration.daemons import START_S, Cluster, children, free_port, until
from integration.reference import greedy

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
PROMPT = [(i * 37 + 11) % 250 for i in range(1400)]
OTHER = PROMPT[::-1]
DISK = ("--prefix-disk", "64MiB")
TOKENS = 6
SmallDisks = Callable[[Path, int], SmallDisk]


def folder_of(cluster: Cluster, worker: str) -> Path:
    return cluster.folder / "home" / "workers" / worker / "prefixes"


def ask(address: str, prompt: list[int]) -> tuple[tuple[int, ...], int]:
    """Return the answer's tokens, and how many of the prompt's tokens came from the cache."""
    with Client(address, timeout_s=120) as client:
        answer = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
    return answer.tokens, answer.usage.cached_tokens


def ask_with_key(port: int, key: str, prompt: list[int]) -> tuple[int, int]:
    """Return the status, and how many of the prompt's tokens came from the cache."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": "default", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, answer["usage"]["prompt_tokens_details"]["cached_tokens"] if reply.status == 200 else 0


def stop(cluster: Cluster) -> None:
    for daemon in reversed(cluster.daemons):
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.said()
    cluster.daemons.clear()


def test_the_files_of_a_revoked_key_are_gone_before_anything_is_served(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "admin"))
    cluster = Cluster(tmp_path, mtls=True)
    keys = KeyStore(cluster.lead.folder)
    (amy, amys), (bob, bobs) = keys.create("amy"), keys.create("bob")
    files = folder_of(cluster, "a")
    port = free_port()

    def start() -> None:
        cluster.worker("a", *DISK)
        cluster.serving(llama, 1, "--http", f"127.0.0.1:{port}")

    try:
        start()
        for key in (amys, bobs):
            assert ask_with_key(port, key, PROMPT) == (200, 0)
        owners = [owner_key(client_of(key)) for key in (amy, bob)]
        until(lambda: all(list(files.glob(f"{owner}/*/00001024-*/r*")) for owner in owners))
        stop(cluster)
        assert {path.name for path in files.iterdir()} == set(owners)

        keys.revoke("amy")
        start()
        assert [path.name for path in files.iterdir()] == owners[1:]
        assert ask_with_key(port, amys, PROMPT)[0] == 401
        status, cached = ask_with_key(port, bobs, PROMPT)
        assert status == 200
        assert cached >= 1024
    finally:
        cluster.close()


@pytest.mark.small_disk
def test_a_disk_that_fills_keeps_what_fits(cluster: Cluster, llama: Path, small_disk: SmallDisks) -> None:
    room = 400_000  # one piece of 512 tokens, and a part of the next one
    disk = small_disk(folder_of(cluster, "a"), DISK_MARGIN_BYTES + room)
    cluster.worker("a", *DISK)
    _, address = cluster.serving(llama, 1)
    expected = greedy(llama, PROMPT, TOKENS)
    assert ask(address, PROMPT) == (expected, 0)
    cluster.daemons[0].wait_for("no room")
    assert 0 < sum(path.stat().st_size for path in disk.path.rglob("*") if path.is_file()) <= room
    stop(cluster)
    cluster.worker("a", *DISK)
    _, address = cluster.serving(llama, 1)
    assert ask(address, PROMPT) == (expected, 512)
    assert ask(address, OTHER) == (greedy(llama, OTHER, TOKENS), 0)
    stop(cluster)


@pytest.mark.small_disk
def test_a_folder_that_becomes_read_only_serves_what_it_has(
    cluster: Cluster, llama: Path, small_disk: SmallDisks
) -> None:
    disk = small_disk(folder_of(cluster, "a"), 2 * DISK_MARGIN_BYTES)

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk.path)], check=True, timeout=20, capture_output=True)

    cluster.worker("a", *DISK)
    _, address = cluster.serving(llama, 1)
    ask(address, PROMPT)
    until(lambda: list(disk.path.glob("*/*/00001024-*/r*")))
    stop(cluster)
    worker = cluster.worker("a", *DISK)
    _, address = cluster.serving(llama, 1)
    damaged = next(disk.path.glob("*/*/00001024-*/r1"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    remount("ro")
    assert ask(address, PROMPT) == (greedy(llama, PROMPT, TOKENS), 512), "the beginning before the damage"
    worker.wait_for('writing to disk paused reason="Read-only file system"')
    assert ask(address, OTHER) == (greedy(llama, OTHER, TOKENS), 0)
    assert ask(address, PROMPT[:600])[0] == greedy(llama, PROMPT[:600], TOKENS)
    assert "Traceback" not in worker.said()

    stop(cluster)
    refused = cluster.worker("a", *DISK)
    assert refused.process.wait(START_S) == 1
    assert "Read-only file system; check that disk" in " ".join(refused.said().split())
    assert "Traceback" not in refused.said()
    remount("rw")


def test_an_engine_that_dies_in_a_read_costs_the_read_alone(cluster: Cluster, models: Path) -> None:
    hybrid = make("qwen3_next", models / "qwen3_next")

    def start() -> str:
        for name in ("a", "b"):
            cluster.worker(name, *DISK)
        return cluster.serving(hybrid, 2)[1]

    address = start()
    ask(address, PROMPT)
    end = f"*/*/{len(PROMPT) - 1:08}-*"
    for name in ("a", "b"):
        until(lambda name=name: list(folder_of(cluster, name).glob(f"{end}/[rs]*")))  # type: ignore[misc]
    stop(cluster)

    address = start()
    with Client(address, timeout_s=30) as client:
        names = [stage.worker for stage in client.cluster().stages]
    first, killed = (next(daemon for daemon in cluster.daemons if daemon.name == name) for name in names)
    (node,) = folder_of(cluster, first.name).glob(end)
    before = node.stat().st_mtime_ns
    (engine,) = children(killed.process.pid)
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, address, [*PROMPT, 7, 8, 9])
        until(lambda: node.stat().st_mtime_ns != before)  # the other worker has read its part
        os.kill(engine, signal.SIGKILL)
        tokens, _ = asked.result(120)
    assert tokens == greedy(hybrid, [*PROMPT, 7, 8, 9], TOKENS)
    with Client(address, timeout_s=30) as client:
        state = client.cluster()
    assert state.recoveries == 1
    assert state.state == "serving"
    stop(cluster)
