"""Hold a snapshot of an engine loop: its live requests, lanes and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.coordinator.stage_utilization import StageUtilization
from cluster.coordinator.step_times import StageStepTime, StepTimes
from cluster.core.cluster_state import LiveRequest, RequestState
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class LoopView:
    """The state of an engine loop. ``lane_sizes`` has one entry per lane; other figures have one per stage."""

    requests: tuple[LiveRequest, ...]
    lane_sizes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    prefix_bytes: tuple[int, ...]
    prefixes: int
    bubbles: tuple[float, ...]
    step_times: tuple[StageStepTime, ...] = ()
    busy_s: tuple[float, ...] = ()
    active_s: float = 0.0

    @classmethod
    def of(
        cls, scheduler: Scheduler, ages: Mapping[str, float], occupancy: StageUtilization, step_times: StepTimes | None
    ) -> LoopView:
        """Build the view. ``ages`` maps request ids to seconds since acceptance; others are omitted."""
        live = ((s, ages.get(s.request.id)) for s in scheduler.sequences)
        return cls(
            requests=tuple(_describe_request(s, age) for s, age in live if age is not None),
            lane_sizes=scheduler.lane_sizes,
            reserved_bytes=scheduler.reserved,
            prefix_bytes=scheduler.prefixes.used,
            prefixes=len(scheduler.prefixes),
            bubbles=occupancy.bubbles(),
            step_times=step_times.stages() if step_times else (),
            busy_s=occupancy.busy_s,
            active_s=occupancy.active_s,
        )


def _describe_request(s: ScheduledSequence, age_s: float) -> LiveRequest:
    return LiveRequest(
        request_id=s.request.id,
        state=RequestState(s.phase),
        prompt_tokens=len(s.request.prompt),
        prefilled_tokens=min(s.prefilled, len(s.request.prompt)),
        completion_tokens=s.produced,
        lane=s.lane if s.lane >= 0 else None,
        age_seconds=age_s,
        cached_tokens=s.cached,
    )
