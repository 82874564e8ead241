"""Where one request's time went: first token, mean time between tokens, and each stage's share."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.scheduler.outcome import Outcome
from cluster.types import PlannedStage, StageFigures


class Tally:
    """Sums a request's frames. Times given are the engine loop's clock, in seconds."""

    def __init__(self, accepted_at: float, stages: Sequence[PlannedStage]) -> None:
        self._accepted_at, self._stages = accepted_at, stages
        self._first_token_at = self._last_token_at = accepted_at
        self._tokens = 0
        self._ring_us = 0.0
        self._compute_us = [0] * len(stages)
        self._wait_us = [0] * len(stages)

    def frame(self, outcome: Outcome, now: float) -> None:
        self._ring_us += (now - outcome.sent_at) * 1e6
        for timing in outcome.timings:
            self._compute_us[timing.stage] += timing.compute_us
            self._wait_us[timing.stage] += timing.wait_us

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
        inside = sum(self._compute_us) + sum(self._wait_us)
        wire_us = max(self._ring_us - inside, 0.0) / len(self._stages)
        return tuple(
            StageFigures(s.worker, s.layers, compute / 1e3, wire_us / 1e3, wait / 1e3)
            for s, compute, wait in zip(self._stages, self._compute_us, self._wait_us, strict=True)
        )
