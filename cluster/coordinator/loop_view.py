"""Hold a snapshot of an engine loop: its live requests, lanes and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.coordinator.stage_utilization import StageUtilization
from cluster.coordinator.step_times import StageStepTime, StepTimes
from cluster.core.cluster_state import GuessCounts, LiveRequest, RequestState
from cluster.core.request import StageFigures
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class AnswerProgress:
    """How far a sample is: the seconds since it was accepted, and what ``LiveRequest`` shows of its answer."""

    age_s: float
    guessed: int = 0
    tokens_per_second: float = 0.0
    stages: tuple[StageFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class LoopView:
    """The state of an engine loop. ``lane_sizes`` has one entry per lane; other figures have one per stage."""

    requests: tuple[LiveRequest, ...]
    lane_sizes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    prefix_bytes: tuple[int, ...]
    prefixes: int
    bubbles: tuple[float | None, ...]
    """Idle shares of the last ``OCCUPANCY_S``; None if no frame came back in it."""
    step_times: tuple[StageStepTime, ...] = ()
    busy_s: tuple[float, ...] = ()
    active_s: float = 0.0
    guesses: tuple[GuessCounts, ...] = ()
    """Since the model was loaded, by source."""
    guesses_without_room: int = 0
    """Times since the model was loaded that there was no memory for the marks of guesses."""
    wasted_s: tuple[float, ...] = ()
    """Seconds of this epoch in which the stages computed wrong guesses."""
    disk_reads: Mapping[str, int] = field(default_factory=dict)
    """Reads of prefixes from the workers' disks since the model was loaded, by outcome."""
    disk_tokens: int = 0
    """Tokens that they spared the stages to prefill."""

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        answers: Mapping[str, AnswerProgress],
        occupancy: StageUtilization,
        step_times: StepTimes | None,
        now: float,
    ) -> LoopView:
        """Build the view at ``now``. ``answers`` has the live samples by request id; others are omitted."""
        live = ((s, answers.get(s.request.id)) for s in scheduler.sequences)
        counts = scheduler.speculation.counts
        return cls(
            requests=tuple(_describe_request(s, progress) for s, progress in live if progress),
            lane_sizes=scheduler.lane_sizes,
            reserved_bytes=scheduler.reserved,
            prefix_bytes=scheduler.prefixes.used,
            prefixes=len(scheduler.prefixes),
            bubbles=occupancy.bubbles(now),
            step_times=step_times.stages() if step_times else (),
            busy_s=occupancy.busy_s,
            active_s=occupancy.active_s,
            guesses=tuple(
                GuessCounts(source, c.guessed, c.accepted, c.voided, c.rows)
                for source, c in sorted(counts.by_source.items())
            ),
            guesses_without_room=counts.without_room,
            wasted_s=tuple(counts.wasted_s),
            disk_reads={outcome.value: count for outcome, count in scheduler.disk_use.reads.items()},
            disk_tokens=scheduler.disk_use.tokens,
        )


def _describe_request(s: ScheduledSequence, progress: AnswerProgress) -> LiveRequest:
    return LiveRequest(
        request_id=s.request.id,
        state=RequestState(s.phase),
        prompt_tokens=len(s.request.prompt),
        prefilled_tokens=min(s.prefilled, len(s.request.prompt)),
        completion_tokens=s.produced,
        lane=s.lane if s.lane >= 0 else None,
        age_seconds=progress.age_s,
        cached_tokens=s.cached,
        guessed_tokens=progress.guessed,
        window=s.window,
        tokens_per_second=progress.tokens_per_second,
        stages=progress.stages if s.lane >= 0 else (),
    )
