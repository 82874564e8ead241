"""Real daemons behind proxies: three stages and a spare. A scenario breaks and mends their processes and links."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import Client, ClusterState
from cluster.client.channel_setup import channel_credentials, load_trust
from cluster.core.errors import MacpipeError
from faults.history import History
from faults.monitor import StatusMonitor
from faults.proxy import Proxy, owner
from faults.scenario import ORDERLY, Fault, Kind
from integration.daemons import Cluster, Daemon, children, free_port, launch, wait_serving, watchdog_pipe

NAMES = ("ada", "bob", "cyd", "dee")
MODEL = "faq"
MEND_S = 60.0
LEAVE_S = 30.0
"""A daemon that was told to stop ends in DRAIN_S, 15 s, however much goes wrong."""


GUESSING = Path(__file__).resolve().parents[2] / "ops" / "bench" / "replay_coordinator.py"
REPLAY_RATE = "0.6"


def launch_guessing(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a coordinator that guesses answers which it gave before, a set share of their tokens rightly."""
    command = [sys.executable, str(GUESSING), *arguments, "--exit-with-stdin"]
    environment = {**os.environ, "PYTHONPATH": str(GUESSING.parents[2]), "REPLAY_RATE": REPLAY_RATE}
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True, env=environment
        )


@dataclass
class Party:
    """One worker: where it listens, and the address under which the others know it."""

    name: str
    host: str
    control: int
    data: int
    daemon: Daemon | None = None
    leaving: threading.Thread | None = None
    """Waits for the end of a daemon that was told to stop, or of a drain."""
    drained: bool = False

    @property
    def pids(self) -> list[int]:
        """The daemon's, its engine's and its standby's."""
        if self.daemon is None or self.daemon.process.poll() is not None:
            return []
        return [self.daemon.process.pid, *children(self.daemon.process.pid)]

    @property
    def engine(self) -> int | None:
        return next(iter(self.pids[1:]), None)


@dataclass
class Fleet:
    """``stages`` of the parties hold the model; the others are spares."""

    folder: Path
    stages: int = 3
    names: tuple[str, ...] = NAMES
    options: tuple[str, ...] = ()
    speculate: bool = False
    """Guess the tokens of all answers, many of them wrong."""
    cluster: Cluster = field(init=False)
    parties: dict[str, Party] = field(default_factory=dict)
    announced: bool = False
    """Whether the coordinator finds its workers by their announcements. Then nothing goes through the proxies."""

    def __post_init__(self) -> None:
        self.cluster = Cluster(self.folder)
        self.proxy = Proxy(self._who, random.Random(0))
        block = f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}"
        for i, name in enumerate(self.names, 10):
            party = self.parties[name] = Party(name, f"{block}.{i}", free_port(), free_port())
            self.start_worker(name)
        for party in self.parties.values():
            assert party.daemon
            party.daemon.wait_for("of cluster")
        self.start_coordinator()

    def start_worker(self, name: str) -> None:
        party = self.parties[name]
        self.proxy.listen(party.host, party.control, name, data=False)
        self.proxy.listen(party.host, party.data, name, data=True)
        ports = ("--port", str(party.control), "--data-port", str(party.data), "--standby")
        party.daemon = self.cluster.worker(name, *ports)

    def find_workers(self, *, announced: bool) -> None:
        """Have the coordinator find its workers by their announcements, or by the addresses of their proxies."""
        if self.announced == announced:
            return
        self.mend()
        self.announced = announced
        self.client.close()
        self.monitor.close()
        self.serve.stop()
        self.start_coordinator()

    def start_coordinator(self, port: int = 0) -> None:
        port = port or free_port()
        peers = [o for p in self.parties.values() for o in ("--peer", f"{p.host}:{p.control}")]
        found = [] if self.announced else ["--peers-only", *peers]
        options = ["--workers", str(self.stages), "--port", str(port), "--wait", "60", *found]
        start = launch_guessing if self.speculate else launch
        self.serve = self.cluster.serve(MODEL, *options, *self.options, launch=start)
        self.address = f"127.0.0.1:{port}"
        wait_serving(self.address, self.serve)
        self.client = Client(self.address, timeout_s=60)
        if hasattr(self, "monitor"):
            self.monitor.close()
        self.monitor = StatusMonitor(self.address)

    def close(self) -> None:
        self.monitor.close()
        self.mend_processes(restart=False)
        self.client.close()
        self.cluster.close()
        self.proxy.close()

    def _who(self, port: int, there: int) -> str:
        pids = {pid: p.name for p in self.parties.values() for pid in p.pids}
        if hasattr(self, "serve"):
            pids[self.serve.process.pid] = "serve"
        return owner(port, there, pids) or "serve"

    # Breaking

    def strike(self, fault: Fault, plan: tuple[str, ...]) -> str:
        """Make it go wrong; in words."""
        at = min(fault.stage, len(plan) - 1)
        name = plan[at]
        if fault.kind in ORDERLY:
            return self._leave(fault.kind, name, plan)
        before = plan[at - 1] if at and fault.data else "serve"
        return self._strike_process(fault.kind, name) or self._strike_link(fault.kind, before, name)

    def _leave(self, kind: Kind, name: str, plan: tuple[str, ...]) -> str:
        """Drain a worker, or stop its daemon; for a spare, the first one."""
        if kind is Kind.LEAVE_SPARE:
            name = next((n for n in self.parties if n not in plan), name)
        party = self.parties[name]
        if party.daemon is None or party.daemon.process.poll() is not None or party.leaving:
            return f"{kind} {name}, which is not there"
        party.drained = kind is Kind.DRAIN_WORKER
        if not party.drained:
            party.daemon.process.send_signal(signal.SIGTERM)
        work = self._drain if party.drained else self._see_off
        party.leaving = threading.Thread(target=work, args=(party,), daemon=True)
        party.leaving.start()
        return f"{kind} {name}"

    def _drain(self, party: Party) -> None:
        with suppress(MacpipeError), Client(self.address, timeout_s=60) as client:
            client.drain(party.name)

    def _see_off(self, party: Party) -> None:
        """Once the daemon has ended, let its ports refuse connections, as those of any ended process."""
        assert party.daemon
        party.daemon.process.wait(LEAVE_S)
        self.proxy.refuse(party.host, party.control)
        self.proxy.refuse(party.host, party.data)

    def _strike_process(self, kind: Kind, name: str) -> str:
        party = self.parties[name]
        signals = {
            Kind.KILL_ENGINE: signal.SIGKILL,
            Kind.CRASH_ENGINE: signal.SIGSEGV,
            Kind.ABORT_ENGINE: signal.SIGABRT,
            Kind.STOP_ENGINE: signal.SIGSTOP,
            Kind.KILL_WORKER: signal.SIGKILL,
            Kind.STOP_WORKER: signal.SIGSTOP,
        }
        if kind not in signals:
            return ""
        whole = kind in (Kind.KILL_WORKER, Kind.STOP_WORKER)
        for pid in party.pids if whole else [party.engine]:
            with suppress(ProcessLookupError, TypeError):
                os.kill(pid, signals[kind])  # type: ignore[arg-type]
        if kind is Kind.KILL_WORKER:
            self.proxy.refuse(party.host, party.control)
            self.proxy.refuse(party.host, party.data)
        return f"{kind} {name}"

    def _strike_link(self, kind: Kind, a: str, b: str) -> str:
        link = self.proxy.link(a, b)
        match kind:
            case Kind.CUT:
                link.blocked |= {a, b}
            case Kind.CUT_ONE_WAY:
                link.blocked.add(b)
            case Kind.DELAY:
                link.delay_s = 0.1
            case Kind.THROTTLE:
                link.rate = 10e6 / 8
            case Kind.CORRUPT:
                link.corrupt = 1
            case _:
                self.proxy.reset(a, b)
        return f"{kind} {a}-{b}"

    # Mending

    def mend(self) -> None:
        """Heal links, start what is dead, wait until everybody is there and every stage has a worker."""
        self.proxy.heal()
        self.mend_processes()
        deadline = time.monotonic() + MEND_S
        while not self._whole(state := self.client.cluster()):
            assert time.monotonic() < deadline, f"the fleet does not mend: {state}\n{self.serve.said()[-4000:]}"
            assert self.serve.process.poll() is None, self.serve.said()[-4000:]
            self._take_back()
            if state.state == "serving" and len(state.stages) < self.stages and self._all_there(state):
                with suppress(MacpipeError):
                    self.client.load(MODEL, workers=self.stages).wait()
            time.sleep(0.05)

    def _whole(self, state: ClusterState) -> bool:
        return state.state == "serving" and len(state.stages) == self.stages and self._all_there(state)

    def _all_there(self, state: ClusterState) -> bool:
        usable = [w for w in state.workers if w.standing == "up" and not w.problem and not w.draining]
        return len(usable) == len(self.parties)

    def mend_processes(self, *, restart: bool = True) -> None:
        for party in self.parties.values():
            for pid in party.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            if party.leaving:
                party.leaving.join(LEAVE_S)
                party.leaving = None
            if restart and not party.pids:
                party.drained = False
                self._move_ports(party)
                self.start_worker(party.name)

    def _move_ports(self, party: Party) -> None:
        """A worker that is announced takes free ports, and others than before."""
        if self.announced:
            party.control, party.data = free_port(), free_port()

    def _take_back(self) -> None:
        """Undo drains as soon as the drained worker answers."""
        for party in self.parties.values():
            with suppress(MacpipeError):
                if party.drained:
                    self.client.drain(party.name, undo=True)
                    party.drained = False

    # Looking

    def plan(self) -> tuple[str, ...]:
        """Return the names of the stages' workers, in order."""
        return tuple(s.worker for s in self.client.cluster().stages)

    def watching(self, history: History) -> Callable[[], None]:
        """Note every change of health from now on; call what is returned to end that."""
        credentials, options = channel_credentials(load_trust(None), self.address)
        channel = grpc.secure_channel(self.address, credentials, options=options)
        request = health_pb2.HealthCheckRequest(service="")
        call = health_pb2_grpc.HealthStub(channel).Watch(request)

        def follow() -> None:
            with suppress(grpc.RpcError):
                for reply in call:
                    history.note("health", serving=reply.status == health_pb2.HealthCheckResponse.SERVING)

        thread = threading.Thread(target=follow, name="health", daemon=True)
        thread.start()

        def end() -> None:
            call.cancel()
            thread.join(5)
            channel.close()

        return end


def fleet(folder: Path) -> Iterator[Fleet]:
    """A fixture's body."""
    made = Fleet(folder)
    try:
        yield made
    finally:
        made.close()
