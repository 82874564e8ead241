"""Real daemons that serve several models, the first one by two replicas. Processes are killed; links are left alone."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from checkpoints import make
from cluster.client import Client, ClusterState
from cluster.core.cluster_state import ServingState
from cluster.core.errors import MacpipeError
from faults.campaign import Campaign
from faults.fleet import MEND_S, Fleet, Party
from faults.monitor import StatusMonitor
from faults.scenario import LINK, Asked, Fault, Kind, Scenario, pool, scenario
from integration.daemons import Cluster, free_port, wait_serving

ARCHITECTURES = ("llama", "qwen3", "gemma3_text")
STAGES = (1, 2, 1)
"""Of the first models; all others have one."""
REPLICAS = 2
"""Of the first model."""
SPARES = 1
TOKENS = 250
"""Token ids that the tokenizer of a tiny model knows."""


class DeploymentFleet(Fleet):
    """``deployments`` models, on as many workers as their stages, and a spare one. Workers are given as peers."""

    def __init__(self, folder: Path, deployments: int) -> None:
        self.folder, self.options, self.speculate = folder, (), False
        self.models = [f"m{i}" for i in range(deployments)]
        self.sizes = [STAGES[i] if i < len(STAGES) else 1 for i in range(deployments)]
        self.names = self._name_workers()
        self.parties: dict[str, Party] = {}
        self.announced = False
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster = Cluster(folder)
        self.file = self._write_models()
        for name in self.names:
            self.parties[name] = Party(name, "127.0.0.1", free_port(), 0)
            self.start_worker(name)
        for party in self.parties.values():
            assert party.daemon
            party.daemon.wait_for("of cluster")
        self.start_coordinator()

    def _name_workers(self) -> tuple[str, ...]:
        """Set the number of stages, and return the names of as many workers and a spare one."""
        self.stages = sum(self.sizes) + REPLICAS - 1
        return tuple(f"mac{i}" for i in range(self.stages + SPARES))

    def _write_models(self) -> Path:
        tables = []
        for i, (name, stages) in enumerate(zip(self.models, self.sizes, strict=True)):
            folder = make(ARCHITECTURES[i % len(ARCHITECTURES)], self.folder / name, seed=i)
            facts = [f'name = "{name}"', f'source = "{folder}"', f"workers = {stages}", "pin = true"]
            facts += ["max-context = 512", f"replicas = {REPLICAS if i == 0 else 1}"]
            tables.append("\n".join(["[[model]]", *facts]))
        file = self.folder / "models.toml"
        file.write_text("\n\n".join(tables))
        return file

    def start_worker(self, name: str) -> None:
        party = self.parties[name]
        party.daemon = self.cluster.worker(name, "--port", str(party.control), "--standby")

    def start_coordinator(self, port: int = 0) -> None:
        port = port or free_port()
        peers = [o for p in self.parties.values() for o in ("--peer", f"{p.host}:{p.control}")]
        self.serve = self.cluster.serve(f"--models={self.file}", "--port", str(port), "--peers-only", *peers)
        self.address = f"127.0.0.1:{port}"
        wait_serving(self.address, self.serve)
        self.client = Client(self.address, timeout_s=60)
        self.monitor = StatusMonitor(self.address)

    def find_workers(self, *, announced: bool) -> None:
        """Do nothing: all workers are peers."""

    def close(self) -> None:
        self.monitor.close()
        self.mend_processes(restart=False)
        self.client.close()
        self.cluster.close()

    def _strike_process(self, kind: Kind, name: str) -> str:
        """Hit one engine of a worker that holds several models, or all of its processes."""
        party = self.parties[name]
        killed = signal.SIGSTOP if kind in (Kind.STOP_ENGINE, Kind.STOP_WORKER) else signal.SIGKILL
        whole = kind in (Kind.KILL_WORKER, Kind.STOP_WORKER)
        for pid in party.pids if whole else party.pids[1:2]:
            with suppress(ProcessLookupError):
                os.kill(pid, killed)
        return f"{kind} {name}"

    def _see_off(self, party: Party) -> None:
        assert party.daemon
        party.daemon.process.wait(MEND_S)

    def mend(self) -> None:
        """Start what is dead, and wait until every model is served by all of its replicas."""
        self.mend_processes()
        deadline = time.monotonic() + 2 * MEND_S
        while not self._whole(state := self.client.cluster()):
            assert time.monotonic() < deadline, f"the fleet does not mend: {state}\n{self.serve.said()[-4000:]}"
            assert self.serve.process.poll() is None, self.serve.said()[-4000:]
            self._take_back()
            for deployment in state.deployments:
                if deployment.state is ServingState.IDLE:
                    with suppress(MacpipeError):
                        self.client.load(deployment.name).wait()
            time.sleep(0.05)

    def _whole(self, state: ClusterState) -> bool:
        found = {deployment.name: deployment.replicas for deployment in state.deployments}
        wanted = {name: REPLICAS if name == self.models[0] else 1 for name in self.models}
        return self._all_there(state) and all(
            len(found.get(name, ())) == count and all(one.state is ServingState.SERVING for one in found[name])
            for name, count in wanted.items()
        )

    def plan(self) -> tuple[str, ...]:
        """Return the names of all workers that hold a stage, those of the first model first."""
        stages = (stage for deployment in self.client.cluster().deployments for stage in deployment.stages)
        return tuple(dict.fromkeys(stage.worker for stage in stages))


def deployment_pool(fleet: DeploymentFleet) -> tuple[Asked, ...]:
    """Return the possible requests, to the models in turn."""
    models = fleet.models
    return tuple(replace(one, model=models[i % len(models)]) for i, one in enumerate(pool(TOKENS)))


def process_scenario(seed: int, campaign: Campaign, stages: int | None = None) -> Scenario:
    """Return the scenario of a seed, with a process that is killed or stopped in place of every fault of a link.

    ``stages`` is the number of workers that may be hit: by default, one for each stage of the fleet.
    """
    played = scenario(seed, campaign.asked, stages or campaign.fleet.stages)
    kinds = (Kind.KILL_WORKER, Kind.KILL_ENGINE, Kind.STOP_WORKER)

    def choose(fault: Fault) -> Fault:
        return replace(fault, kind=kinds[seed % len(kinds)]) if fault.kind in LINK else fault

    return replace(played, faults=tuple(map(choose, played.faults)), announced=False)
