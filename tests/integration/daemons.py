"""Real daemons as processes: start them as a person would, wait for their output, and end them with the test."""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cluster.cli.process_group import reserve_port
from cluster.client import Client
from cluster.core.errors import MacpipeError
from parties import Lead, mtls, shared_lead

START_S = 90
"""Generous: importing mlx takes seconds on a busy machine."""
Launch = Callable[[Sequence[str], Path], "subprocess.Popen[bytes]"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster", *arguments]


def bound(*arguments: str) -> list[str]:
    """The command of a daemon whose standard input is to be ``watchdog_pipe``: it ends with this process, however that
    ends.
    """
    return command(*arguments, "--exit-with-stdin")


@cache
def watchdog_pipe() -> int:
    """Return the read end of a pipe whose write end this process holds until it ends."""
    end, _ = os.pipe()
    return end


def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a ``macpipe`` process on this machine in its own session, with its output in ``log``."""
    with log.open("wb") as out:
        return subprocess.Popen(
            bound(*arguments), stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True
        )


@dataclass
class Daemon:
    """One process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = START_S) -> str:
        """Wait until the process has said ``text``; everything it said."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            code = self.process.poll()
            assert code is None, f"{self.name} ended with {code} before it said {text!r}:\n{self.said()}"
            assert time.monotonic() < deadline, f"{self.name} has not said {text!r}:\n{self.said()}"
            time.sleep(0.05)
        return self.said()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 10) -> int:
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)


@dataclass(frozen=True)
class Footprint:
    """The resources of one process: bytes of memory, threads, open files, and how much of the memory is its own.

    The rest are pages of files, most of them code: they come when they are first used, and the system may drop them.
    """

    resident: int
    threads: int
    files: int
    own: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        kib = {line[0]: int(line[1]) for line in lines if line and line[0] in ("VmRSS:", "RssAnon:")}
        threads, files = (len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("task", "fd"))
        return cls(kib["VmRSS:"] * 1024, threads, files, kib["RssAnon:"] * 1024)


@dataclass
class Cluster:
    """Daemons of one cluster name in one folder; with ``mtls`` each holds a certificate, and so does this process."""

    folder: Path
    name: str = field(default_factory=lambda: f"test-{secrets.token_hex(4)}")
    daemons: list[Daemon] = field(default_factory=list)
    mtls: bool = field(default_factory=mtls)
    loopback: bool = True
    """With ``mtls``: on loopback all the same, where every machine has multicast."""

    def __post_init__(self) -> None:
        if self.mtls:
            self.lead = Lead.like(shared_lead(), self.folder / "coordinator", self.name)
            self.lead.admit_coordinator()

    def worker(self, name: str, *options: str, launch: Launch = launch, admit: bool = True) -> Daemon:
        """Start a worker; it is ready once it has said ``worker NAME of cluster``. ``admit``: let it in first."""
        home = self.folder / "home"
        if self.mtls:
            options = self._admitted(name, home, options, admit)
        lean = () if "--standby" in options else ("--no-standby",)  # its imports would take two seconds of every test's
        own = ["--name", name, "--cluster", self.name, "--home", str(home), "--profile", "off", *lean]
        return self._start(name, ["worker", *own, *options], launch)

    def _admitted(self, name: str, home: Path, options: tuple[str, ...], admit: bool) -> tuple[str, ...]:
        """Let the worker in, once; like all of this machine's it is to be found on loopback."""
        if admit and name not in {m.name for m in self.lead.members.current()}:
            self.lead.admit_worker(name, home)
        return options if "--host" in options or not self.loopback else ("--host", "127.0.0.1", *options)

    def serve(self, model: str | Path, *options: str, launch: Launch = launch) -> Daemon:
        home = self.folder / "coordinator"
        http = () if "--http" in options else ("--http", "off")  # two of one machine cannot have the default port
        here = ("--host", "127.0.0.1") if self.mtls and self.loopback and "--host" not in options else ()
        own = ["--cluster", self.name, "--home", str(home), *http, *here]
        return self._start("serve", ["serve", str(model), *own, *options], launch)

    def serving(self, model: str | Path, workers: int, *more: str, wait_s: float = START_S) -> tuple[Daemon, str]:
        """Start a coordinator on a free port and wait until it serves; the daemon and its address."""
        port = free_port()
        options = ["--workers", str(workers), "--port", str(port), "--wait", str(wait_s), *more]
        daemon, address = self.serve(model, *options), f"127.0.0.1:{port}"
        wait_serving(address, daemon)
        return daemon, address

    def _start(self, name: str, arguments: Sequence[str], launch: Launch) -> Daemon:
        log = self.folder / f"{name}-{len(self.daemons)}.log"
        daemon = Daemon(name, launch(arguments, log), log)
        self.daemons.append(daemon)
        return daemon

    def footprints(self) -> list[Footprint]:
        """Of every daemon and the engines, in the order of their start. A coordinator's processes come and go."""
        engines = {d.process.pid: children(d.process.pid) for d in self.daemons if d.name != "serve"}
        pids = [d.process.pid for d in self.daemons]
        return [Footprint.of(p) for pid in pids for p in (pid, *engines.get(pid, ()))]

    def close(self) -> None:
        """End all daemons, by SIGKILL if necessary."""
        for daemon in reversed(self.daemons):
            if daemon.process.poll() is None:
                daemon.process.terminate()
        for daemon in self.daemons:
            try:
                daemon.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.process.pid, signal.SIGKILL)
                daemon.process.wait(10)


@cache
def _reservations() -> ExitStack:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack


def free_port() -> int:
    """Return a TCP port of loopback that no other test gets while this process runs, in whatever process it runs."""
    return _reservations().enter_context(reserve_port("127.0.0.1"))


def wait_serving(address: str, serve: Daemon, timeout_s: float = START_S) -> None:
    """Wait until a token has gone through every stage."""
    deadline = time.monotonic() + timeout_s
    while True:
        assert serve.process.poll() is None, f"serve ended:\n{serve.said()}"
        assert time.monotonic() < deadline, f"serve is not serving:\n{serve.said()}"
        try:
            with Client(address, timeout_s=5) as client:
                if client.cluster().state == "serving":
                    return
        except MacpipeError:
            pass
        time.sleep(0.1)


def serve_model(client: Client, model: Path | str, workers: int, **options: object) -> None:
    """Load a model over that many of the session's workers, and wait until it serves."""
    for _ in client.load(str(model), workers=workers, **options):  # type: ignore[arg-type]
        pass
    state = client.cluster()
    assert state.state == "serving"
    assert len(state.stages) == workers


def start_workers(cluster: Cluster, *names: str, options: tuple[str, ...] = ()) -> tuple[list[int], dict[str, Daemon]]:
    """Start workers for a coordinator in this process. Return their ports and daemons once they run."""
    ports = [free_port() for _ in names]
    daemons = {n: cluster.worker(n, "--port", str(port), *options) for n, port in zip(names, ports, strict=True)}
    for name, daemon in daemons.items():
        daemon.wait_for(f"worker {name} of cluster")
    return ports, daemons


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, the oldest first: a worker's engine before its standby."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append((int(fields[19]), int(stat.parent.name)))
    return [child for _, child in sorted(found)]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def until(seen: Callable[[], object], timeout_s: float = START_S) -> None:
    """Wait until ``seen()`` is true."""
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.02)
