"""Three Macs in network namespaces: a leader and a standby, and a worker on each Mac, one of them a spare.

Every process runs inside its Mac's namespace, and so do the connections of this process (``inside``). A pulled cable is
a pulled cable: packets vanish and no connection is closed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.client import Client, ClusterState
from cluster.core.errors import MacpipeError
from cluster.security.roles import Role
from faults.coordinator_scenario import Blow, Strike, Target
from faults.hosts import FleetHost
from integration.daemons import Daemon, bound, children, watchdog_pipe
from parties import Lead

CLUSTER = "chaos"
MODEL = "faq"
GRPC_PORT, WORKER_PORT = 7700, 7800
MEND_S = 180.0


@dataclass
class Mac:
    """One Mac: its host, its state folder, and the daemons on it."""

    name: str
    host: FleetHost
    home: Path
    daemons: dict[str, Daemon] = field(default_factory=dict)
    starts: int = 0

    def start(self, role: str, *arguments: str) -> None:
        """Start a daemon as ``role``."""
        self.starts += 1
        log = self.home.parent / f"{self.name}-{role}-{self.starts}.log"
        own = ["--cluster", CLUSTER, "--home", str(self.home), "--host", self.host.address]
        words = self.host.inside(*bound(*arguments, *own))
        with log.open("wb") as out:
            process = subprocess.Popen(words, stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True)
        self.daemons[role] = Daemon(f"{self.name} {role}", process, log)

    def pids(self, role: str) -> list[int]:
        """Return the process of a daemon and its children; nothing if it has ended."""
        daemon = self.daemons.get(role)
        if daemon is None or daemon.process.poll() is not None:
            return []
        return [daemon.process.pid, *children(daemon.process.pid)]

    def send(self, role: str, number: int) -> None:
        for pid in self.pids(role):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def send_all(self, number: int) -> None:
        for role in self.daemons:
            self.send(role, number)

    def kill(self, *roles: str) -> None:
        """Kill daemons and their children, and wait until they have ended: what is dying still seems to run."""
        for role in roles:
            self.send(role, signal.SIGKILL)
        for role in roles:
            self.daemons[role].process.wait(10)

    def running(self, role: str) -> bool:
        return bool(self.pids(role))


class Unmended(Exception):
    """The Macs did not come back to a whole ring and a standby in sync in ``MEND_S``."""


class CoordinatorFleet:
    """Three Macs on ``hosts``; the first two have a coordinator each. Close it at the end."""

    def __init__(
        self, folder: Path, hosts: Sequence[FleetHost], replicate: str = "sync", http: str = "off", stages: int = 2
    ) -> None:
        self.replicate, self.http, self.stages = replicate, http, stages
        self.macs = [Mac(f"mac{n}", host, folder / f"mac{n}") for n, host in enumerate(hosts, 1)]
        try:
            self._admit(folder)
            for mac in self.macs:
                self.start_worker(mac)
            for mac in self.macs:
                mac.daemons["worker"].wait_for("of cluster", MEND_S)
            self.start_coordinator(self.macs[0])
            self.wait_serving()
            self.start_coordinator(self.macs[1])
            self.mend()
        except BaseException:
            self.close()
            raise

    def _admit(self, folder: Path) -> None:
        lead = Lead.make(self.macs[0].home, CLUSTER)
        lead.admit_coordinator("mac1-coordinator")
        lead.admit(Role.COORDINATOR, "mac2-coordinator", "c2" * 8, self.macs[1].home)
        for mac in self.macs:
            lead.admit_worker(mac.name, mac.home)
        os.environ["MACPIPE_HOME"] = str(folder / "client")
        lead.admit(Role.ADMIN, "chaos", "ad" * 8, folder / "client")

    @property
    def coordinators(self) -> list[Mac]:
        return self.macs[:2]

    @property
    def addresses(self) -> str:
        """Where clients look for the leader."""
        return ",".join(f"{mac.host.address}:{GRPC_PORT}" for mac in self.coordinators)

    def start_worker(self, mac: Mac) -> None:
        options = ("--name", mac.name, "--port", str(WORKER_PORT), "--profile", "off", "--no-standby")
        mac.start("worker", "worker", *options)

    def start_coordinator(self, mac: Mac) -> None:
        """Start a coordinator by its Mac's own command. The first Mac's names the model, and leads if nobody does."""
        peers = [word for one in self.macs for word in ("--peer", f"{one.host.address}:{WORKER_PORT}")]
        others = [f"{one.host.address}:{GRPC_PORT}" for one in self.coordinators if one is not mac]
        first = mac is self.macs[0]
        leads = (MODEL, "--workers", str(self.stages), "--journal", "always", "--replicate", self.replicate)
        role = leads if first else ("--standby", "--coordinator", *others)
        common = ("--http", self.http, "--port", str(GRPC_PORT), "--join-port", "0", "--peers-only", *peers)
        mac.start("coordinator", "serve", *role, *common)

    # Breaking

    def aim(self, strikes: Sequence[Strike], number: int) -> list[tuple[Mac, str]]:
        """Return the Mac and the role of the process that each strike is to hit, while all is well.

        Workers are those that hold layers, beginning with the one of ``number``.
        """
        holding = [stage.worker for stage in self.state().stages]
        standby = next(mac for mac in self.coordinators if mac is not self.leader)
        found = []
        for i, strike in enumerate(strikes):
            name = holding[(number + i) % len(holding)]
            macs = {
                Target.LEADER: self.leader,
                Target.STANDBY: standby,
                Target.WORKER: next(mac for mac in self.macs if mac.name == name),
            }
            found.append((macs[strike.target], "worker" if strike.target is Target.WORKER else "coordinator"))
        return found

    def strike(self, mac: Mac, role: str, blow: Blow) -> None:
        """Hit a process, its whole Mac, or the cable of that."""
        match blow:
            case Blow.KILL:
                mac.kill(role)
            case Blow.STOP:
                mac.send(role, signal.SIGSTOP)
            case Blow.CRASH:
                mac.kill(*mac.daemons)
            case Blow.SLEEP:
                mac.send_all(signal.SIGSTOP)
            case Blow.CUT:
                mac.host.unplug()

    def undo(self, mac: Mac, role: str, blow: Blow) -> None:
        """Start what was killed with its disk, have what was stopped go on, or plug the cable in."""
        match blow:
            case Blow.KILL:
                self._restart(mac, role)
            case Blow.STOP:
                mac.send(role, signal.SIGCONT)
            case Blow.CRASH:
                self._restart_all(mac)
            case Blow.SLEEP:
                mac.send_all(signal.SIGCONT)
            case Blow.CUT:
                mac.host.plug()

    def _restart(self, mac: Mac, role: str) -> None:
        if not mac.running(role):
            self.start_worker(mac) if role == "worker" else self.start_coordinator(mac)

    def _restart_all(self, mac: Mac) -> None:
        for role in tuple(mac.daemons):
            self._restart(mac, role)

    # Mending

    def mend(self) -> None:
        """Bring everything back, and wait until a whole ring serves and the standby is in sync."""
        for mac in self.macs:
            mac.host.plug()
            mac.send_all(signal.SIGCONT)
            self._restart_all(mac)
        end = time.monotonic() + MEND_S
        while True:
            with suppress(MacpipeError):
                state = self.state()
                if self._is_complete(state) and state.leadership:
                    self.leader = self._leader_of(state)
                    if len(state.stages) == self.stages:
                        return
                    self._load()  # the last loss left one Mac, which holds the whole model
            if time.monotonic() >= end:
                raise Unmended(f"the Macs do not mend in {MEND_S:.0f} s:\n{self.said()}")
            time.sleep(0.1)

    def _is_complete(self, state: ClusterState) -> bool:
        """Return whether a ring serves, all workers can be used, and the standby is in sync."""
        known = state.leadership
        usable = [w for w in state.workers if w.standing == "up" and not w.problem]
        in_sync = known is not None and [standby.in_sync for standby in known.standbys] == [True]
        return state.state == "serving" and len(usable) == len(self.macs) and in_sync

    def _load(self) -> None:
        with Client(self.addresses, cluster=CLUSTER, timeout_s=MEND_S) as client:
            client.load(MODEL, workers=self.stages).wait()

    def _leader_of(self, state: ClusterState) -> Mac:
        assert state.leadership
        assert state.leadership.leader
        addresses = state.leadership.leader.addresses
        return next(mac for mac in self.coordinators if any(mac.host.address in a for a in addresses))

    def state(self) -> ClusterState:
        with Client(self.addresses, cluster=CLUSTER, timeout_s=5) as client:
            return client.cluster()

    def wait_serving(self) -> None:
        end = time.monotonic() + MEND_S
        while True:
            with suppress(MacpipeError):
                if self.state().state == "serving":
                    return
            assert time.monotonic() < end, f"nobody serves: {self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        """Return the ends of all daemons' logs."""
        daemons = [daemon for mac in self.macs for daemon in mac.daemons.values()]
        return "\n".join(f"--- {daemon.name}\n{daemon.said()[-1500:]}" for daemon in daemons)

    def close(self) -> None:
        """Kill all processes."""
        for mac in self.macs:
            mac.send_all(signal.SIGCONT)
            mac.kill(*mac.daemons)
