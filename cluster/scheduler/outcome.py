"""The scheduler's results for a frame that came back."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.errors import Reason
from cluster.core.frames import Sample, StageTiming
from cluster.core.request import FinishReason, PromptLogprobs
from cluster.scheduler.guessing import GuessSource


@dataclass(frozen=True, slots=True)
class Produced:
    """A request's next token. ``finish`` is set on the last one. An end-of-sequence token is not part of the answer."""

    request_id: str
    index: int
    sample: Sample
    finish: FinishReason | None
    counts: bool
    """False for the end-of-sequence token."""
    cached: int
    """Prompt tokens taken from a kept prefix."""
    guess: GuessSource | None = None
    """Who guessed the token, if it had been sent as a guess when it was sampled."""
    missed: GuessSource | None = None
    """Who guessed another token, if that had been sent as a guess when this one was sampled."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The log-probabilities of a piece of a request's prompt. The pieces come in order, before the first token."""

    request_id: str
    logprobs: PromptLogprobs


@dataclass(frozen=True, slots=True)
class SampleFailed:
    """A stage failed a step of this request. The scheduler has removed the request."""

    request_id: str
    stage: int
    reason: Reason
    sentence: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The scheduler has removed this request: new stages can never hold it, or it made room in the queue."""

    request_id: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one frame that came back. ``request_ids`` are the live requests that it computed for.

    A guess that was of no use counts for no request.
    """

    request_ids: tuple[str, ...]
    timings: tuple[StageTiming, ...]
    sent_at: float
    events: tuple[Produced | SampleFailed | PromptScored, ...] = ()
    rows: int = 0
    """Sequences in a decode frame of one token each; 0 for a frame that failed, and for any other."""
    context: int = 0
    """Average number of tokens of the frame's live sequences, prompt and answer."""
    prefills: int = 0
    """Prompt tokens that the frame prefilled."""
