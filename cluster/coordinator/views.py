"""What an engine loop shows of itself: its live requests, its lanes, its memory."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.coordinator.pace import StagePace
from cluster.scheduler.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class RequestView:
    """A live request as ``macpipe ps`` shows it."""

    id: str
    phase: Phase
    prompt_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    completion_tokens: int
    lane: int
    age_s: float


@dataclass(frozen=True, slots=True)
class LoopView:
    """What the loop has under way. Bytes and shares have an entry a stage, ``lane_sizes`` one a lane."""

    requests: tuple[RequestView, ...]
    lane_sizes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    prefix_bytes: tuple[int, ...]
    prefixes: int
    bubbles: tuple[float, ...]
    pace: tuple[StagePace, ...] = ()
    busy_s: tuple[float, ...] = ()
    active_s: float = 0.0


def viewed(s: Sequence, age_s: float) -> RequestView:
    return RequestView(
        id=s.request.id,
        phase=s.phase,
        prompt_tokens=len(s.request.prompt),
        prefilled_tokens=s.prefilled,
        cached_tokens=s.cached,
        completion_tokens=s.produced,
        lane=s.lane,
        age_s=age_s,
    )
