"""What the scheduler returns when a frame has come back."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.frames import Sample, StageTiming
from cluster.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class Produced:
    """A request's next token. ``finish`` is set with the last; an end-of-sequence token is no part of the answer."""

    request_id: str
    index: int
    sample: Sample
    finish: FinishReason | None
    counts: bool
    """False for the end-of-sequence token."""
    cached: int
    """Prompt tokens that a kept prefix brought."""


@dataclass(frozen=True, slots=True)
class SampleFailed:
    """A stage could not do a step of this request, which has been taken out."""

    request_id: str
    stage: int
    reason: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The stages of a new epoch can never hold this request, which has been taken out."""

    request_id: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A frame's way round the ring is over. ``request_ids`` are the live requests that it computed for."""

    request_ids: tuple[str, ...]
    timings: tuple[StageTiming, ...]
    sent_at: float
    events: tuple[Produced | SampleFailed, ...] = ()
    rows: int = 0
    """Sequences that decoded together; 0 for any other frame."""
    context: int = 0
    """Tokens that each of them has, on average."""
    prefills: int = 0
    """Tokens that the frame prefilled."""
