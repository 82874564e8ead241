"""Hold a snapshot of an engine loop: its live requests, lanes and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.coordinator.stage_utilization import StageUtilization
from cluster.coordinator.step_times import StageStepTime, StepTimes
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class RequestView:
    """A live request, as shown by ``macpipe ps``. ``age_s`` is the time since it was accepted."""

    id: str
    phase: Phase
    prompt_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    completion_tokens: int
    lane: int
    age_s: float

    @classmethod
    def of(cls, s: Sequence, age_s: float) -> RequestView:
        return cls(
            id=s.request.id,
            phase=s.phase,
            prompt_tokens=len(s.request.prompt),
            prefilled_tokens=min(s.prefilled, len(s.request.prompt)),
            cached_tokens=s.cached,
            completion_tokens=s.produced,
            lane=s.lane,
            age_s=age_s,
        )


@dataclass(frozen=True, slots=True)
class LoopView:
    """The state of an engine loop. ``lane_sizes`` has one entry per lane; other figures have one per stage."""

    requests: tuple[RequestView, ...]
    lane_sizes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    prefix_bytes: tuple[int, ...]
    prefixes: int
    bubbles: tuple[float, ...]
    pace: tuple[StageStepTime, ...] = ()
    busy_s: tuple[float, ...] = ()
    active_s: float = 0.0

    @classmethod
    def of(
        cls, scheduler: Scheduler, ages: Mapping[str, float], occupancy: StageUtilization, pace: StepTimes | None
    ) -> LoopView:
        """Build the view. ``ages`` maps request ids to seconds since acceptance; others are omitted."""
        live = ((s, ages.get(s.request.id)) for s in scheduler.sequences)
        return cls(
            requests=tuple(RequestView.of(s, age) for s, age in live if age is not None),
            lane_sizes=scheduler.lane_sizes,
            reserved_bytes=scheduler.reserved,
            prefix_bytes=scheduler.prefixes.used,
            prefixes=len(scheduler.prefixes),
            bubbles=occupancy.bubbles(),
            pace=pace.stages() if pace else (),
            busy_s=occupancy.busy_s,
            active_s=occupancy.active_s,
        )
