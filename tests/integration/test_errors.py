"""Errors for people: each names the cause and the way out, has the right exit code, and comes in time."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import make
from integration.daemons import Cluster, command, free_port

pytestmark = pytest.mark.timeout(120)
shared = pytest.mark.xdist_group("trio")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=90)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def refused(*arguments: str, code: int = 1) -> str:
    """Run a command that must fail, and return its last sentence."""
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    return " ".join(done.stderr.split())


def test_no_worker_found_says_what_to_check(llama: Path) -> None:
    said = refused("serve", str(llama), "--cluster", "nobody-is-here", "--wait", "2", "--port", "0")
    for part in ("waited 2 s", "found no worker", "nobody-is-here", "macpipe worker", "--peer"):
        assert part in said


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three idle workers; nothing loads a model there."""
    made = Cluster(tmp_path_factory.mktemp("trio"))
    try:
        for worker in [made.worker(name) for name in ("abe", "bea", "cid")]:
            worker.wait_for(f"worker {worker.name} of cluster")
        yield made
    finally:
        made.close()


@shared
def test_fewer_workers_than_wanted_says_who_is_there(trio: Cluster, llama: Path) -> None:
    said = refused("serve", str(llama), "--cluster", trio.name, "--workers", "4", "--wait", "2", "--port", "0")
    assert "for 4 workers" in said
    assert "found abe, bea, cid" in said


def test_a_peer_that_does_not_answer_is_named(llama: Path) -> None:
    peer = f"127.0.0.1:{free_port()}"
    said = refused("serve", str(llama), "--cluster", "nobody", "--peer", peer, "--wait", "4", "--port", "0")
    assert f"the worker does not answer at {peer}" in said


def test_a_missing_model_folder(tmp_path: Path) -> None:
    said = refused("serve", str(tmp_path / "nothing"), "--wait", "1", "--port", "0")
    assert "nothing" in said


@pytest.mark.long
def test_a_folder_without_safetensors(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert "safetensors" in refused("serve", str(tmp_path), "--wait", "1", "--port", "0")


@pytest.mark.long
def test_a_pickle_checkpoint_is_refused(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    said = refused("serve", str(tmp_path), "--wait", "1", "--port", "0")
    assert "pickle" in said.lower()
    assert "safetensors" in said


@pytest.mark.long
def test_a_looped_model_is_refused(tmp_path: Path) -> None:
    said = refused("serve", str(make("looped", tmp_path / "looped")), "--wait", "1", "--port", "0")
    assert "loop" in said.lower()


@shared
def test_not_enough_clean_cuts(trio: Cluster, tmp_path: Path) -> None:
    two = make("llama", tmp_path / "two", layers=2)
    said = refused("serve", str(two), "--cluster", trio.name, "--workers", "3", "--wait", "60", "--port", "0")
    assert "2 stages at most" in said
    assert "--workers 2" in said


def test_what_does_not_fit_says_how_many_gib(cluster: Cluster, llama: Path) -> None:
    cluster.worker("tiny", "--memory-limit", "100KiB").wait_for("worker tiny of cluster")
    said = refused("serve", str(llama), "--cluster", cluster.name, "--workers", "1", "--wait", "1", "--port", "0")
    assert "does not fit" in said
    assert re.search(r"tiny lacks [\d.]+ [KM]iB", said)
    assert "--memory-limit" in said


OTHER_VERSION = """
import sys
import cluster
cluster.__version__ = "9.9.9"
from cluster.cli.main import main
sys.exit(main())
"""


def test_a_worker_of_another_version(cluster: Cluster, llama: Path) -> None:
    def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-c", OTHER_VERSION, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    cluster.worker("old", launch=launch).wait_for("worker old of cluster")  # type: ignore[arg-type]
    said = refused("serve", str(llama), "--cluster", cluster.name, "--wait", "4", "--port", "0")
    assert "old runs macpipe 9.9.9" in said
    assert "install the same version" in said


def test_two_workers_of_one_name(cluster: Cluster, llama: Path) -> None:
    cluster.worker("twin").wait_for("worker twin of cluster")
    again = cluster.worker("twin")
    assert again.process.wait(60) == 1
    assert "already runs on this machine" in again.said()
    other_home = str(cluster.folder / "other")
    cluster.worker("twin", "--home", other_home).wait_for("worker twin of cluster")
    said = refused("serve", str(llama), "--cluster", cluster.name, "--workers", "2", "--wait", "30", "--port", "0")
    assert "two workers are named twin" in said
    assert "--name" in said


def test_a_port_in_use(cluster: Cluster, llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused("serve", str(llama), "--wait", "1", "--port", port)
        assert port in said
        assert "--port" in said
        worker = cluster.worker("solo", "--port", port)
        assert worker.process.wait(60) == 1
        assert "another program uses the port" in worker.said()


@pytest.mark.parametrize("name", ["status", "ps", "generate"])
def test_a_coordinator_that_is_not_there(name: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = ["-p", "hello"] if name == "generate" else []
    said = refused(name, *options, "--coordinator", address)
    assert address in said
    assert "macpipe serve" in said or "--coordinator" in said


def test_an_unknown_option_is_wrong_usage() -> None:
    assert "--wrokers" in refused("serve", "faq", "--wrokers", "2", code=2)
    assert "layer 4" in refused("serve", "faq", "--layers", "0-3,5-7", code=2)


@shared
def test_layers_that_cannot_be(trio: Cluster, llama: Path) -> None:
    said = refused("serve", str(llama), "--cluster", trio.name, "--layers", "0-8", "--wait", "30", "--port", "0")
    assert "layers 0-3" in said


def test_errors_are_json_where_json_was_asked_for() -> None:
    done = run("status", "--json", "--coordinator", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["reason"] == "UNREACHABLE"
