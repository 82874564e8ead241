"""The state of everything at one moment, as ``macpipe status`` and ``macpipe ps`` show it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.ring import RingStage
from cluster.coordinator.roster import RosterEntry
from cluster.core.plan import Plan
from cluster.membership.suspicion import Belief


class ServingState(StrEnum):
    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Repair:
    """What is being done about a loss, or to move layers as planned. ``expected_s`` counts from its beginning; 0: it
    waits for a Mac.
    """

    worker: str
    cause: str
    since_s: float
    doing: str
    expected_s: float
    attempts: int


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
