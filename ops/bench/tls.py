"""Measures the cost of mutual TLS per hop: two rings of macpipe's data ports, with local credentials and with mTLS.

Each ring has two stages in separate processes, and a driver in this one. A round trip is three hops of a message as
long as a decode frame of a large model (16 KiB). Both rings run all the time and are measured alternately.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from figures import Figure, options, print_figures

from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import open_trust
from cluster.security.keyring import make_request
from cluster.security.roles import Role
from cluster.security.trust import COORDINATOR, WORKER, Trust
from cluster.transport.grpc_streams import DataServer, GrpcDialer
from cluster.transport.streams import Line, Outbox

EPOCH = 1
HOPS = 3
CLUSTER = "bench"


class Echo:
    """A stage that forwards what it receives."""

    def __init__(self) -> None:
        self._outboxes = {line: Outbox(EPOCH) for line in Line}

    def outbox(self, epoch: int, line: Line) -> Outbox | None:
        return self._outboxes[line] if epoch == EPOCH else None

    def received(self, message: bytes) -> None:
        self._outboxes[Line.URGENT].send(message)


def gone(why: str) -> None:
    """The ring is closing."""


def serve(home: Path, name: str, before: str) -> None:
    """Run one stage until standard input ends. Print its address first."""
    trust, stage = open_trust(home, CLUSTER, WORKER, name=name), Echo()
    server = DataServer(trust, "127.0.0.1", 0, stage)
    if before:
        GrpcDialer(trust).pull(before, EPOCH, stage.received, gone)
    print(f"127.0.0.1:{server.port}", flush=True)
    sys.stdin.read()
    os._exit(0)  # the threads of streams would hold the process


class Ring:
    """A ring of two stages. Drive it with ``step``."""

    def __init__(self, stack: ExitStack, home: Path, trust: Trust) -> None:
        first = self._stage(stack, home, "one", "")
        last = self._stage(stack, home, "two", first)
        self._back: SimpleQueue[bytes] = SimpleQueue()
        dialer = GrpcDialer(trust)
        stack.callback(dialer.pull(last, EPOCH, self._back.put, gone).close)
        self._feed = dialer.feed(first, EPOCH, gone)
        stack.callback(self._feed.close)

    @staticmethod
    def _stage(stack: ExitStack, home: Path, name: str, before: str) -> str:
        command = [sys.executable, __file__, "--stage", name, "--home", str(home), "--before", before]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(process.wait)
        assert process.stdin
        assert process.stdout
        stack.callback(process.stdin.close)
        return process.stdout.readline().strip()

    def step(self, message: bytes) -> None:
        self._feed.send(message)
        self._back.get(timeout=10)


def found(home: Path) -> None:
    """Create a cluster of a coordinator and two workers, in one state folder."""
    folder = ClusterFolder(home, CLUSTER)
    authority = Authority.make(folder, time.time())
    parties = ((Role.COORDINATOR, ""), (Role.WORKER, "one"), (Role.WORKER, "two"))
    for number, (role, name) in enumerate(parties):
        key, request = make_request()
        certificate = authority.sign(request, role, f"{number:016x}", name or "lead", time.time())
        folder.keep(role, name, key=key, certificate=certificate)


def timed(ring: Ring, message: bytes, steps: int) -> float:
    """Return the microseconds per hop."""
    began = time.perf_counter()
    for _ in range(steps):
        ring.step(message)
    return (time.perf_counter() - began) / steps / HOPS * 1e6


def measure(runs: dict[str, Callable[[int], float]], steps: int, rounds: int) -> list[Figure]:
    for run in runs.values():
        run(steps // 4)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(run(steps))
    return [Figure(name, "us a hop", values) for name, values in took.items()]


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--bytes", type=int, default=16 * 1024)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stage", default="", help="be this stage of a ring")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--before", default="")
    asked = parser.parse_args()
    if asked.stage:
        serve(asked.home, asked.stage, asked.before)
    message = os.urandom(asked.bytes)
    with ExitStack() as stack:
        homes = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-tls-"))) for _ in range(2)]
        found(homes[1])
        local, secured = (Ring(stack, home, open_trust(home, CLUSTER, COORDINATOR)) for home in homes)
        runs = {
            "local": lambda steps: timed(local, message, steps),
            "mtls": lambda steps: timed(secured, message, steps),
        }
        figures = measure(runs, asked.steps, asked.rounds)
    us = {f.name: f.median for f in figures}
    differences = sorted(m - p for p, m in zip(figures[0].rounds, figures[1].rounds, strict=True))
    ratios = {"added_us_per_hop": differences[len(differences) // 2], "mtls_over_local": us["mtls"] / us["local"]}
    print_figures("us_per_hop", figures, ratios, asked.json, {"bytes": asked.bytes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
