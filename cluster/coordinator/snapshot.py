"""The state of everything at one moment, as ``macpipe status`` and ``macpipe ps`` show it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.coordinator.ring import RingStage
from cluster.coordinator.roster import Member
from cluster.coordinator.views import LoopView
from cluster.types import Plan


class ServingState(StrEnum):
    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``plan`` and ``loop`` are None while nothing is loaded; ``problem`` is a sentence while ``state`` is failed."""

    cluster: str
    state: ServingState
    problem: str
    plan: Plan | None
    ring: tuple[RingStage, ...]
    members: tuple[Member, ...]
    loop: LoopView | None
    finished: int
    tokens: int
    uptime_s: float
