"""The state of everything at one moment, as ``macpipe status`` and ``macpipe ps`` show it."""

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
    """``plan`` and ``loop`` are None while nothing is loaded.

    ``problem`` is a sentence, and ``repair`` there, while ``state`` is recovering or failed; ``move`` is there while
    layers are moved as planned.
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
    """What does not work as asked for while answers go on, a sentence each."""
    lag_s: float = 0.0
    """How late things happen on this machine; 0.0 unless it is overloaded."""
