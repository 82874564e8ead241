from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.scripted import Coordinator
from cluster.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
MACPIPE = [sys.executable, "-W", "error", "-m", "cluster"]
Macpipe = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with Coordinator() as running:
        yield running


@pytest.fixture
def environment() -> dict[str, str]:
    """Without anything that changes what macpipe does or shows."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MACPIPE_", "XDG_", "COLUMNS"))}
    return kept | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def macpipe(environment: dict[str, str]) -> Macpipe:
    """Run the command in a process; ``to`` names the coordinator, ``stdin`` is piped."""

    def run(
        *arguments: str, to: Coordinator | None = None, stdin: str = "", **more: str
    ) -> subprocess.CompletedProcess[str]:
        chosen = {"MACPIPE_COORDINATOR": to.address} if to else {}
        return subprocess.run(
            [*MACPIPE, *arguments],
            input=stdin,
            env=environment | chosen | more,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )

    return run


@pytest.fixture
def macpipe_here(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Macpipe:
    """Run the command in this process, which has imported all it needs: for what is refused at once.

    It has a thread of its own, since ``plan`` closes its thread's MLX streams.
    """
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as end, ThreadPoolExecutor(1) as thread:
            thread.submit(main, arguments).result()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), said.out, said.err)

    return run
