"""Hold the state of the cluster at one moment, as shown by ``macpipe status`` and ``macpipe ps``."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.ring import RingStage
from cluster.coordinator.roster import RosterEntry
from cluster.core.plan import Plan
from cluster.core.state import Repair, ServingState
from cluster.membership.suspicion import Belief


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the cluster. ``plan`` and ``loop`` are None while nothing is loaded.

    While ``state`` is recovering or failed, ``problem`` is a sentence and ``repair`` is set. ``move`` is set during a
    planned move of layers.
    """

    cluster: str
    state: ServingState
    problem: str
    plan: Plan | None
    ring: tuple[RingStage, ...]
    members: tuple[RosterEntry, ...]
    loop: LoopView | None
    finished: int
    tokens: int
    uptime_s: float
    repair: Repair | None = None
    move: Repair | None = None
    recoveries: int = 0
    beliefs: tuple[Belief, ...] = ()
    warnings: tuple[str, ...] = ()
    """Sentences on features that do not work while requests are still answered."""
    lag_s: float = 0.0
    """Scheduling lag of this machine in seconds; 0.0 unless it is overloaded."""
