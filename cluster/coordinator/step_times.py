"""Compare the measured time of decode frames on each stage with the time predicted for the same frames.

Each frame has its own prediction, from its rows and their mean context. The ratio of measured to predicted time
corrects a worker's profile. It is the median over the last frames, so that a frame which waited for another program or
compiled a kernel counts no more than any other. This module keeps figures; it sends nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from cluster.core.frames import StageTiming
from cluster.core.limits import LEARNED_FRAMES, LEAST_FRAMES
from cluster.core.plan import ModelShape, Plan, PlannedStage, Profile
from cluster.core.worker import WorkerInfo
from cluster.placement.predicted_step_time import decode_s


@dataclass(frozen=True, slots=True)
class StageStepTime:
    """Medians of a stage's last ``frames`` decode frames, in milliseconds; 0 for fewer than ``limits.LEAST_FRAMES``.

    ``expected_ms`` is the plan's prediction. ``ratio`` is the measured time over the prediction of the profile without
    corrections; 0 if the worker's speed is unknown.
    """

    frames: int = 0
    measured_ms: float = 0.0
    expected_ms: float = 0.0
    ratio: float = 0.0


class StepTimes:
    """Step times of a plan's stages. ``profiles`` are those of the stages' workers, in order.

    Ratios refer to them. A plan may count on another profile, that of an equal Mac, and so may expect another time.
    """

    def __init__(self, shape: ModelShape, stages: Sequence[PlannedStage], profiles: Sequence[Profile]) -> None:
        self._parts = [(shape.of_rank(s.spec.ranks), s.layers) for s in stages]
        self._bare = [replace(p, corrections=()) for p in profiles]
        self._factors = [_planned_factor(shape, s, p) for s, p in zip(stages, profiles, strict=True)]
        self._frames: list[deque[tuple[float, float]]] = [deque(maxlen=LEARNED_FRAMES) for _ in stages]

    @classmethod
    def of(cls, shape: ModelShape, plan: Plan, workers: Sequence[WorkerInfo]) -> StepTimes:
        """Return those of a plan, which ``workers`` hold; of a group, rank 0's stand for all."""
        pairs = [(s, w.profile) for s, w in zip(plan.stages, workers, strict=True) if s.spec.rank == 0]
        return cls(shape, [stage for stage, _ in pairs], [profile for _, profile in pairs])

    def frame(self, timings: Sequence[StageTiming], rows: int, context: int) -> None:
        """Add a decode frame of ``rows`` rows with a mean context of ``context`` tokens."""
        for timing in timings:
            if timing.stage < len(self._frames):
                part, layers = self._parts[timing.stage]
                bare = decode_s(part, self._bare[timing.stage], layers, rows, context)
                self._frames[timing.stage].append((timing.compute_us / 1e3, bare * 1e3))

    def stages(self) -> tuple[StageStepTime, ...]:
        return tuple(_summarize(frames, factor) for frames, factor in zip(self._frames, self._factors, strict=True))


def _planned_factor(shape: ModelShape, stage: PlannedStage, profile: Profile) -> float:
    """Return the plan's prediction over that of the worker's profile without corrections."""
    bare_ms = decode_s(shape.of_rank(stage.spec.ranks), replace(profile, corrections=()), stage.layers) * 1e3
    return stage.decode_ms / bare_ms if stage.decode_ms and bare_ms else profile.correction(shape.model.fingerprint)


def _summarize(frames: Sequence[tuple[float, float]], factor: float) -> StageStepTime:
    if len(frames) < LEAST_FRAMES:
        return StageStepTime(len(frames))
    known = all(bare > 0 for _, bare in frames)
    return StageStepTime(
        frames=len(frames),
        measured_ms=median(measured for measured, _ in frames),
        expected_ms=median(bare for _, bare in frames) * factor,
        ratio=median(measured / bare for measured, bare in frames) if known else 0.0,
    )
