"""Measure one request: time to first token, mean time per token, and the share of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.plan import LayerRange, PlannedStage
from cluster.core.request import StageFigures
from cluster.scheduler.outcome import Outcome


@dataclass(slots=True)
class _Spent:
    compute_us: int = 0
    wait_us: int = 0


class RequestTimings:
    """Sums the frames of one request. Arguments are times of the engine loop's clock, in seconds."""

    def __init__(self, accepted_at: float, stages: Sequence[PlannedStage]) -> None:
        self._accepted_at = accepted_at
        self._first_token_at = self._last_token_at = accepted_at
        self._tokens = 0
        self._ring_us = 0.0
        self._spent: dict[tuple[str, LayerRange], _Spent] = {}
        self._lap: dict[tuple[str, LayerRange], StageFigures] = {}
        self.begin_epoch(stages)

    def begin_epoch(self, stages: Sequence[PlannedStage]) -> None:
        """Switch to the stages of a new epoch. The time spent on earlier stages still counts."""
        self._stages = [self._spent.setdefault((s.worker, s.layers), _Spent()) for s in stages]

    def frame(self, outcome: Outcome, now: float) -> None:
        self._ring_us += (now - outcome.sent_at) * 1e6
        for timing in outcome.timings:
            spent = self._stages[timing.stage]
            spent.compute_us += timing.compute_us
            spent.wait_us += timing.wait_us

    def token(self, now: float) -> None:
        if not self._tokens:
            self._first_token_at = now
        self._last_token_at = now
        self._tokens += 1

    @property
    def ttft_ms(self) -> float:
        return (self._first_token_at - self._accepted_at) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Mean milliseconds between tokens; 0 for fewer than two tokens."""
        return (self._last_token_at - self._first_token_at) * 1e3 / max(self._tokens - 1, 1)

    @property
    def tokens_per_second(self) -> float:
        """The rate since the first token; 0 for fewer than two tokens."""
        return 1e3 / self.tpot_ms if self.tpot_ms else 0.0

    def figures(self) -> tuple[StageFigures, ...]:
        inside = sum(s.compute_us + s.wait_us for s in self._spent.values())
        wire_us = max(self._ring_us - inside, 0.0) / len(self._spent)
        return tuple(
            StageFigures(worker, layers, s.compute_us / 1e3, wire_us / 1e3, s.wait_us / 1e3)
            for (worker, layers), s in self._spent.items()
        )

    def lap(self) -> tuple[StageFigures, ...]:
        """Return the figures of the frames since the previous call."""
        before = self._lap
        now = self.figures()
        self._lap = {(f.worker, f.layers): f for f in now}
        return tuple(_subtract(f, before.get((f.worker, f.layers))) for f in now)


def _subtract(now: StageFigures, before: StageFigures | None) -> StageFigures:
    """Return the difference of two figures.

    Wire time is at least 0: after a recovery, the earlier wire time is shared among more stages.
    """
    if before is None:
        return now
    return StageFigures(
        now.worker,
        now.layers,
        now.compute_ms - before.compute_ms,
        max(now.wire_ms - before.wire_ms, 0.0),
        now.wait_ms - before.wait_ms,
    )


@dataclass(frozen=True, slots=True)
class ClusterTotals:
    """Counts since the coordinator started, as in ``LoopTotals``; ``recoveries`` are of all models."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recoveries: int = 0


@dataclass(slots=True)
class LoopTotals:
    """Numbers of complete answers and of tokens of one engine loop, whose thread counts them.

    ``prompt_tokens`` are those of requests that got a first token; ``cached_tokens`` of them came from a kept prefix.
    """

    finished: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def count_token(self, index: int, sample: int, prompt_tokens: int, cached_tokens: int) -> None:
        """Count token ``index`` of a sample. The prompt is computed once for all samples of a request."""
        self.tokens += 1
        if index == sample == 0:
            self.prompt_tokens += prompt_tokens
            self.cached_tokens += cached_tokens

    def add(self, other: LoopTotals) -> None:
        """Add the numbers of another loop."""
        self.finished += other.finished
        self.tokens += other.tokens
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens


class SummedTotals:
    """The totals of all engine loops since the coordinator started, those that have ended included."""

    def __init__(self) -> None:
        self._ended = LoopTotals()
        self._running: list[LoopTotals] = []

    def open_loop(self) -> LoopTotals:
        """Return the totals of a loop that begins to serve."""
        totals = LoopTotals()
        self._running.append(totals)
        return totals

    def close_loop(self, totals: LoopTotals) -> None:
        """Keep the numbers of a loop that has ended."""
        self._running = [one for one in self._running if one is not totals]
        self._ended.add(totals)

    def sum(self) -> LoopTotals:
        """Return the totals of now."""
        found = LoopTotals()
        for totals in (self._ended, *self._running):
            found.add(totals)
        return found
