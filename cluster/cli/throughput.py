"""From when tokens arrived to how fast that is. Pure arithmetic: it asks nobody, and has no clock.

The rate of several users is the tokens of all over the wall time of all, from the first question to the last token:
never one user's rate times their number. Percentiles are over every gap between two tokens of one answer, of all users
and rounds together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Final

from cluster.core.plan import LayerRange
from cluster.core.request import StageFigures

FRESH_TOKENS: Final = 8
"""A second turn that has to read more than this anew was not kept; its figures would hold a prefill."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One answer as its client saw it: when it was asked for and when each token came, in seconds of one clock."""

    asked_at: float
    tokens_at: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int = 0
    stages: tuple[StageFigures, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the stages still held all but the last words of the prompt."""
        return self.prompt_tokens - self.cached_tokens <= FRESH_TOKENS


Round = Sequence[Arrivals]
"""The answers of users who asked at the same time."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What users see who all ask at once. TTFT runs from the question to the first token, TPOT is between two.

    ``tokens`` came in ``wall_seconds``, over all rounds. ``kept_share`` is how much of the prompts the stages held.
    """

    ttft_p50_ms: float
    ttft_max_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    tokens: int
    wall_seconds: float
    tokens_per_second: float
    kept_share: float


@dataclass(frozen=True, slots=True)
class StageActivity:
    """A stage's counters at one moment: seconds that it computed, and seconds in which the ring held anything."""

    busy_s: float
    active_s: float


@dataclass(frozen=True, slots=True)
class StageTime:
    """Where a token's time goes on one stage, in milliseconds; None where it is not known.

    ``bubble_share`` is how much of the time in which the ring held anything this stage computed nothing.
    """

    worker: str
    layers: LayerRange
    compute_ms: float | None
    wire_ms: float | None
    wait_ms: float | None
    bubble_share: float | None


@dataclass(frozen=True, slots=True)
class Roofline:
    """A stage's compute a token beside what memory allows and what was predicted; None where it is not known.

    ``floor_ms`` is the time to read the slice's weights once; ``share`` is the floor over what was measured.
    """

    worker: str
    layers: LayerRange
    weight_bytes: int
    bandwidth: float | None
    floor_ms: float | None
    predicted_ms: float | None
    measured_ms: float | None
    share: float | None


def turn(rounds: Sequence[Round]) -> Turn:
    """The figures of some rounds of equally many users; every answer has two tokens or more."""
    answers = [answer for one in rounds for answer in one]
    firsts = [(a.tokens_at[0] - a.asked_at) * 1e3 for a in answers]
    gaps = [(later - earlier) * 1e3 for a in answers for earlier, later in pairwise(a.tokens_at)]
    tokens, wall_s = sum(len(a.tokens_at) for a in answers), sum(map(wall, rounds))
    return Turn(
        ttft_p50_ms=median(firsts),
        ttft_max_ms=max(firsts),
        tpot_p50_ms=median(gaps),
        tpot_p99_ms=p99(gaps),
        tokens=tokens,
        wall_seconds=wall_s,
        tokens_per_second=tokens / wall_s,
        kept_share=sum(a.cached_tokens for a in answers) / sum(a.prompt_tokens for a in answers),
    )


def wall(answers: Round) -> float:
    """Seconds from the first question to the last token of all."""
    return max(a.tokens_at[-1] for a in answers) - min(a.asked_at for a in answers)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, between the two values that it falls between."""
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def prefill_rate(answers: Round) -> float:
    """Tokens a second of prompts that were read alone, each up to its first token: the median."""
    return median((a.prompt_tokens - a.cached_tokens) / (a.tokens_at[0] - a.asked_at) for a in answers)


def stage_times(
    rounds: Sequence[Round], activity: Sequence[tuple[Sequence[StageActivity], Sequence[StageActivity]]]
) -> tuple[StageTime, ...]:
    """Each stage's part of a token, from second turns; ``activity`` is each round's, before and after.

    Only answers whose prompt was kept count: of the others, nobody can tell reading from decoding.
    """
    answers = [answer for one in rounds for answer in one]
    kept = [a for a in answers if a.kept]
    tokens = sum(len(a.tokens_at) for a in kept)
    return tuple(
        StageTime(
            worker=stage.worker,
            layers=stage.layers,
            compute_ms=sum(a.stages[i].compute_ms for a in kept) / tokens if tokens else None,
            wire_ms=sum(a.stages[i].wire_ms for a in kept) / tokens if tokens else None,
            wait_ms=sum(a.stages[i].wait_ms for a in kept) / tokens if tokens else None,
            bubble_share=bubble_share([(a[i], b[i]) for a, b in activity if i < min(len(a), len(b))]),
        )
        for i, stage in enumerate(answers[0].stages)
    )


def bubble_share(spans: Sequence[tuple[StageActivity, StageActivity]]) -> float | None:
    """How much of the ring's active time a stage computed nothing, over these spans; None where that is not known."""
    active_s = sum(after.active_s - before.active_s for before, after in spans)
    busy_s = sum(after.busy_s - before.busy_s for before, after in spans)
    return min(max(1 - busy_s / active_s, 0.0), 1.0) if active_s > 0 else None


def roofline(time: StageTime, weight_bytes: int, bandwidth: float, predicted_ms: float) -> Roofline:
    """``bandwidth`` is in bytes a second; 0 means that it is not known, as it does for ``predicted_ms``."""
    floor_ms = weight_bytes / bandwidth * 1e3 if bandwidth else None
    return Roofline(
        worker=time.worker,
        layers=time.layers,
        weight_bytes=weight_bytes,
        bandwidth=bandwidth or None,
        floor_ms=floor_ms,
        predicted_ms=predicted_ms or None,
        measured_ms=time.compute_ms,
        share=floor_ms / time.compute_ms if floor_ms and time.compute_ms else None,
    )
