"""Computes throughput and latency from the arrival times of tokens. Pure arithmetic, without I/O or a clock.

The rate of several users is the tokens of all users over their wall time, from the first request to the last token. It
is never one user's rate times the number of users. Percentiles are over all gaps between consecutive tokens of an
answer, of all users and rounds together.
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
"""A second turn with more uncached tokens than this counts as a cache miss: its times include a prefill."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Arrival times of one answer at the client: of the request and of each token, in seconds of one clock."""

    asked_at: float
    tokens_at: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int = 0
    stages: tuple[StageFigures, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether all of the prompt but its last tokens was in the prefix cache."""
        return self.prompt_tokens - self.cached_tokens <= FRESH_TOKENS


Round = Sequence[Arrivals]
"""The answers of concurrent users."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Latency and throughput of concurrent users.

    TTFT is the time from request to first token, TPOT the time between two tokens. ``tokens`` and ``wall_seconds`` are
    totals over all rounds. ``kept_share`` is the fraction of prompt tokens that came from the prefix cache.
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
    """A stage's counters at one moment: compute seconds, and seconds with a frame in flight in the ring."""

    busy_s: float
    active_s: float


@dataclass(frozen=True, slots=True)
class StageTime:
    """Time per token on one stage, in milliseconds; None if unknown.

    ``bubble_share`` is the fraction of the time with a frame in flight in which this stage computed nothing.
    """

    worker: str
    layers: LayerRange
    compute_ms: float | None
    wire_ms: float | None
    wait_ms: float | None
    bubble_share: float | None


@dataclass(frozen=True, slots=True)
class Roofline:
    """A stage's compute time per token, its memory-bandwidth floor and its prediction; None if unknown.

    ``floor_ms`` is the time to read the stage's weights once. ``share`` is ``floor_ms`` over ``measured_ms``.
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
    """Summarize rounds with equal numbers of users. Every answer must have at least two tokens."""
    answers = [answer for one in rounds for answer in one]
    firsts = [(a.tokens_at[0] - a.asked_at) * 1e3 for a in answers]
    gaps = [(later - earlier) * 1e3 for a in answers for earlier, later in pairwise(a.tokens_at)]
    tokens = sum(len(a.tokens_at) for a in answers)
    wall_s = sum(map(wall, rounds))
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
    """Return the seconds from the first request to the last token of all answers."""
    return max(a.tokens_at[-1] for a in answers) - min(a.asked_at for a in answers)


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile, interpolated between values."""
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def prefill_rate(answers: Round) -> float:
    """Return the median prefill rate, in tokens per second, of prompts sent one at a time."""
    return median((a.prompt_tokens - a.cached_tokens) / (a.tokens_at[0] - a.asked_at) for a in answers)


def stage_times(
    rounds: Sequence[Round], activity: Sequence[tuple[Sequence[StageActivity], Sequence[StageActivity]]]
) -> tuple[StageTime, ...]:
    """Return each stage's time per token in second turns. ``activity`` has each round's counters, before and after.

    Only answers with a cached prompt count: for the others, prefill and decoding cannot be told apart.
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
    """Return the fraction of the ring's active time in which a stage computed nothing; None if unknown."""
    active_s = sum(after.active_s - before.active_s for before, after in spans)
    busy_s = sum(after.busy_s - before.busy_s for before, after in spans)
    return min(max(1 - busy_s / active_s, 0.0), 1.0) if active_s > 0 else None


def joules_per_token(spans: Sequence[tuple[float | None, float | None]], tokens: int) -> float | None:
    """Return the energy for a token from counters before and after each round; None if one is unknown."""
    joules = 0.0
    for before, after in spans:
        if before is None or after is None or after < before:
            return None
        joules += after - before
    return joules / tokens if tokens and joules else None


def roofline(time: StageTime, weight_bytes: int, bandwidth: float, predicted_ms: float) -> Roofline:
    """Compare a stage's time to its bounds. ``bandwidth`` is in bytes/s; 0 means unknown, also for ``predicted_ms``."""
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
