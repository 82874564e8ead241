"""An answer's way through the stages: the frames of a request, and those of others meanwhile.

All times are the coordinator's, in seconds since the request was accepted. Stages report durations alone, so no clocks
are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.frames import StageTiming
from cluster.core.plan import LayerRange


@dataclass(frozen=True, slots=True)
class TracedStage:
    """A stage of an epoch."""

    worker: str
    layers: LayerRange


@dataclass(frozen=True, slots=True)
class TracedEpoch:
    """The stages that computed the frames of an epoch, in order."""

    epoch: int
    stages: tuple[TracedStage, ...]


@dataclass(frozen=True, slots=True)
class TracedFrame:
    """A frame that came back. ``own``: it computed for the traced request.

    ``prompt_tokens`` of prompts were prefilled, or ``rows`` sequences decoded one token each; neither if it verified
    guesses or had edits alone. ``void``: a guess that was of no use. ``tokens`` are the indices of those tokens of the
    traced answer that came with it.
    """

    epoch: int
    lane: int
    number: int
    sent_seconds: float
    returned_seconds: float
    own: bool
    void: bool
    prompt_tokens: int
    rows: int
    timings: tuple[StageTiming, ...]
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """A request, and the frames that were in the ring while it was live, in the order in which they came back.

    ``ended_seconds`` is None while the request is live. ``complete`` is False if its first frames are forgotten.
    """

    request_id: str
    prompt_tokens: int
    ended_seconds: float | None
    complete: bool
    epochs: tuple[TracedEpoch, ...]
    frames: tuple[TracedFrame, ...]
