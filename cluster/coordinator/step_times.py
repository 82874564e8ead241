"""What decode frames took on each stage, beside what was predicted for the very same frames.

Every frame has its own prediction: its rows, and the context that they have on average. The ratio of the two is what a
worker's profile is corrected by: its median over the last frames, so that a frame which waited for another program, or
compiled a kernel, counts no more than any other. It keeps figures; it sends nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from cluster.core.frames import StageTiming
from cluster.core.limits import LEARNED_FRAMES, LEAST_FRAMES
from cluster.core.plan import ModelShape, PlannedStage, Profile
from cluster.placement.cost import decode_s


@dataclass(frozen=True, slots=True)
class StageStepTime:
    """Medians of a stage's last ``frames`` decode frames, in milliseconds; all 0 below limits.LEAST_FRAMES.

    ``expected_ms`` is what the plan predicted for them, ``ratio`` measured over what the profile alone, without any
    correction, says; 0 where the worker's speed is not known.
    """

    frames: int = 0
    measured_ms: float = 0.0
    expected_ms: float = 0.0
    ratio: float = 0.0


class StepTimes:
    """Fed with every decode frame that comes back. ``profiles`` are the stages', as they were when it was planned."""

    def __init__(self, shape: ModelShape, stages: Sequence[PlannedStage], profiles: Sequence[Profile]) -> None:
        self._shape, self._ranges = shape, [s.layers for s in stages]
        self._bare = [replace(p, corrections=()) for p in profiles]
        self._corrections = [p.correction(shape.model.fingerprint) for p in profiles]
        self._frames: list[deque[tuple[float, float]]] = [deque(maxlen=LEARNED_FRAMES) for _ in stages]

    def frame(self, timings: Sequence[StageTiming], rows: int, context: int) -> None:
        """A decode frame of so many rows, with so many tokens of context in each on average."""
        for timing in timings:
            if timing.stage < len(self._frames):
                bare = decode_s(self._shape, self._bare[timing.stage], self._ranges[timing.stage], rows, context)
                self._frames[timing.stage].append((timing.compute_us / 1e3, bare * 1e3))

    def stages(self) -> tuple[StageStepTime, ...]:
        return tuple(_pace(frames, c) for frames, c in zip(self._frames, self._corrections, strict=True))


def _pace(frames: Sequence[tuple[float, float]], correction: float) -> StageStepTime:
    if len(frames) < LEAST_FRAMES:
        return StageStepTime(len(frames))
    known = all(bare > 0 for _, bare in frames)
    return StageStepTime(
        frames=len(frames),
        measured_ms=median(took for took, _ in frames),
        expected_ms=median(bare for _, bare in frames) * correction,
        ratio=median(took / bare for took, bare in frames) if known else 0.0,
    )
