"""Real daemons that serve one model as two stages, each a group of two workers, with a spare worker.

Processes are killed or stopped; links are left alone.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from checkpoints import make
from cluster.core.cluster_state import ClusterState
from faults.campaign import Campaign
from faults.deployment_fleet import DeploymentFleet, process_scenario
from faults.scenario import Fault, Kind, Scenario

GROUPS = (("mac0", "mac1"), ("mac2", "mac3"))
WORKERS = 5


class GroupFleet(DeploymentFleet):
    """A group of two as each of two stages."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, deployments=1)
        self._with_standby = False

    def _name_workers(self) -> tuple[str, ...]:
        self.stages = len(GROUPS)
        return tuple(f"mac{i}" for i in range(WORKERS))

    def _write_models(self) -> Path:
        source = make("llama", self.folder / "m0", num_key_value_heads=4)
        groups = ", ".join(f'"{"+".join(names)}"' for names in GROUPS)
        facts = ['name = "m0"', f'source = "{source}"', f"workers = {len(GROUPS)}", f"group = [{groups}]"]
        file = self.folder / "models.toml"
        file.write_text("\n".join(["[[model]]", *facts, "pin = true", "max-context = 512"]))
        return file

    def strike(self, fault: Fault, plan: tuple[str, ...]) -> str:
        """Hit a worker's rank alone, or its standby, too: then nothing is ready to take the rank's place."""
        self._with_standby = fault.data
        return super().strike(fault, plan)

    def _strike_process(self, kind: Kind, name: str) -> str:
        """Hit the engines of a worker behind its first one, which holds nothing here; or all of its processes."""
        party = self.parties[name]
        sent = {
            Kind.KILL_ENGINE: signal.SIGKILL,
            Kind.CRASH_ENGINE: signal.SIGSEGV,
            Kind.ABORT_ENGINE: signal.SIGABRT,
            Kind.STOP_ENGINE: signal.SIGSTOP,
            Kind.KILL_WORKER: signal.SIGKILL,
            Kind.STOP_WORKER: signal.SIGSTOP,
        }[kind]
        whole = kind in (Kind.KILL_WORKER, Kind.STOP_WORKER)
        ranks = party.pids[2:] if self._with_standby else party.pids[2:3]
        for pid in party.pids if whole else ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
        return f"{kind} {name}{' and its standby' if self._with_standby and not whole else ''}"

    def _whole(self, state: ClusterState) -> bool:
        return self._all_there(state) and state.state == "serving"

    def plan(self) -> tuple[str, ...]:
        """Return the names of all ranks, stage by stage."""
        return tuple(stage.worker for stage in self.client.cluster().stages)

    def mend(self) -> None:
        """Start what is dead. If a loss has dissolved a group, load the model as two groups again."""
        super().mend()
        if any(stage.ranks == 1 for stage in self.client.cluster().stages):
            self.client.unload("m0")
            self.client.load("m0").wait()
            super().mend()


def group_scenario(seed: int, campaign: Campaign) -> Scenario:
    """Return the scenario of a seed; see ``process_scenario``. Any of the ranks may be hit."""
    return process_scenario(seed, campaign, stages=sum(map(len, GROUPS)))
