"""Kill a Mac in mid-answer and print what its user saw: the picture in the README is a record of this.

usage: ops/mac_dies.py

It starts three workers and a coordinator on this machine. Two of the workers hold the bundled model's layers. During an
answer one of these two is killed with its engine (SIGKILL). The answer is printed, with the longest pause after the
kill. Then the prompt is sent again, and the answers are compared. Exits with 1 if they differ.

The picture is made again by
  ops/picture.py ops/docs/pictures/mac-dies.svg 'python ops/mac_dies.py' .venv/bin/python ops/mac_dies.py
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from cluster.cli.chat import BUNDLED
from cluster.cli.demo import HOST, wait_until_serving
from cluster.cli.process_group import ProcessGroup, reserve_port
from cluster.client import Client, ClusterState

WORKERS = ("mac-1", "mac-2", "mac-3")
PROMPT = "What happens when a Mac dies?"
PIECES_BEFORE = 12
"""Pieces of the answer that are printed before the Mac is killed."""
SLOWER = 4
"""Factor by which the workers are slowed down: otherwise the small model has answered before the Mac is dead."""


def start(processes: ProcessGroup, folder: Path, port: int) -> dict[str, int]:
    """Start the workers, and a coordinator that uses two of them. Return the workers' process ids."""
    cluster = f"dying-{port}"
    pids = {}
    for name in WORKERS:
        own = [
            "--name",
            name,
            "--host",
            HOST,
            "--home",
            str(folder / name),
            "--profile",
            "off",
            "--throttle",
            str(SLOWER),
        ]
        pids[name] = processes.start(name, ["worker", "--cluster", cluster, *own])
    own = ["--workers", "2", "--host", HOST, "--port", str(port), "--wait", "60", "--home", str(folder / "coordinator")]
    processes.start("coordinator", ["serve", BUNDLED, "--cluster", cluster, "--layers", "0-3,4-7", *own])
    return pids


def describe(state: ClusterState) -> str:
    return "   ".join(f"{stage.worker}: layers {stage.layers}" for stage in state.stages)


def answer_while_killing(client: Client, pid: int) -> list[tuple[float, str]]:
    """Kill process group ``pid`` during an answer. Return the answer's pieces, each with the seconds waited for it."""
    pieces: list[tuple[float, str]] = []
    last = time.monotonic()
    with client.stream_chat([("user", PROMPT)]) as stream:
        for piece in stream.texts():
            now = time.monotonic()
            pieces.append((now - last, piece))
            last = now
            if len(pieces) == PIECES_BEFORE:
                os.killpg(pid, signal.SIGKILL)
    return pieces


def print_answer(console: Console, pieces: list[tuple[float, str]], victim: str) -> None:
    """Print an answer, with the kill and the longest pause after it."""
    pause = max(waited for waited, _ in pieces[PIECES_BEFORE:])
    for number, (waited, piece) in enumerate(pieces):
        if number == PIECES_BEFORE:
            console.print(f"[kill -9 {victim}]", style="bold red", end="")
        if number >= PIECES_BEFORE and waited == pause:
            console.print(f"[{pause:.1f} s]", style="bold yellow", end="")
        console.print(piece, end="")
    console.print()


def main() -> int:
    console = Console(highlight=False, markup=False)
    with (
        reserve_port(HOST) as port,
        tempfile.TemporaryDirectory(prefix="macpipe-dies-") as name,
        ProcessGroup(Path(name)) as processes,
    ):
        pids = start(processes, Path(name), port)
        with Client(f"{HOST}:{port}", cluster=f"dying-{port}") as client:
            before = wait_until_serving(processes, client)
            victim = before.stages[-1].worker
            console.print(f"{describe(before)}   spare: {', '.join(sorted(set(WORKERS) - held(before)))}", style="dim")
            console.print(f"> {PROMPT}", style="bold")
            pieces = answer_while_killing(client, pids[victim])
            print_answer(console, pieces, victim)
            console.print(describe(client.cluster()), style="dim")
            same = client.chat([("user", PROMPT)]).text == "".join(piece for _, piece in pieces)
            console.print(
                "asked again, without a kill: the same answer" if same else "asked again: ANOTHER ANSWER", style="dim"
            )
    return 0 if same else 1


def held(state: ClusterState) -> set[str]:
    return {stage.worker for stage in state.stages}


if __name__ == "__main__":
    sys.exit(main())
