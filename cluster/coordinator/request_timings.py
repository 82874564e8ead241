"""Where one request's time went: first token, mean time between tokens, and each stage's share."""

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
    """Sums a request's frames. Times given are the engine loop's clock, in seconds."""

    def __init__(self, accepted_at: float, stages: Sequence[PlannedStage]) -> None:
        self._accepted_at = accepted_at
        self._first_token_at = self._last_token_at = accepted_at
        self._tokens = 0
        self._ring_us = 0.0
        self._spent: dict[tuple[str, LayerRange], _Spent] = {}
        self._lap: dict[tuple[str, LayerRange], StageFigures] = {}
        self.go_on(stages)

    def go_on(self, stages: Sequence[PlannedStage]) -> None:
        """From now on the frames are computed by these; what others have done still counts."""
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
        """Mean milliseconds between tokens; 0 where there were fewer than two."""
        return (self._last_token_at - self._first_token_at) * 1e3 / max(self._tokens - 1, 1)

    def figures(self) -> tuple[StageFigures, ...]:
        inside = sum(s.compute_us + s.wait_us for s in self._spent.values())
        wire_us = max(self._ring_us - inside, 0.0) / len(self._spent)
        return tuple(
            StageFigures(worker, layers, s.compute_us / 1e3, wire_us / 1e3, s.wait_us / 1e3)
            for (worker, layers), s in self._spent.items()
        )

    def lap(self) -> tuple[StageFigures, ...]:
        """The figures of the frames since the lap before."""
        before, now = self._lap, self.figures()
        self._lap = {(f.worker, f.layers): f for f in now}
        return tuple(_since(f, before.get((f.worker, f.layers))) for f in now)


def _since(now: StageFigures, before: StageFigures | None) -> StageFigures:
    """Not below 0: after a recovery, what was on the wire before is shared by more stages."""
    if before is None:
        return now
    compute, wait = now.compute_ms - before.compute_ms, now.wait_ms - before.wait_ms
    return StageFigures(now.worker, now.layers, compute, max(now.wire_ms - before.wire_ms, 0.0), wait)


@dataclass(slots=True)
class LoopTotals:
    """Complete answers and their tokens, over a coordinator's life."""

    finished: int = 0
    tokens: int = 0
