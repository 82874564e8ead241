"""What the scheduler returns when a frame has come back."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.frames import Failure, Sample
from cluster.types import FinishReason, StageTiming


@dataclass(frozen=True, slots=True)
class Produced:
    """A request's next token. ``finish`` is set with the last; an end-of-sequence token is no part of the answer."""

    request_id: str
    index: int
    sample: Sample
    finish: FinishReason | None
    counts: bool
    """False for the end-of-sequence token."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A stage could not do a step of this request, which has been taken out."""

    request_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Outcome:
    """A frame's way round the ring is over. ``request_id`` is empty where its request had left before."""

    request_id: str
    timings: tuple[StageTiming, ...]
    sent_at: float
    event: Produced | Failed | None = None
