"""How many tokens a prefill frame may carry, so that nobody's next token waits longer than the budget."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.types import StageTiming

_SMOOTHING = 0.3
_UNKNOWN_CHUNK = 32
"""Before anything was measured, while others decode."""
_LEAST_CHUNK = 8


class Pacing:
    """Learns the slowest stage's microseconds a token from the frames that come back."""

    def __init__(self, chunk: int, max_step_ms: float | None) -> None:
        self._chunk, self._max_step_ms = chunk, max_step_ms
        self._us_a_token: float | None = None

    def learn(self, tokens: int, timings: Sequence[StageTiming]) -> None:
        """A prefill frame of so many tokens came back."""
        if not timings or tokens < _LEAST_CHUNK:
            return
        measured = max(t.compute_us for t in timings) / tokens
        known = self._us_a_token if self._us_a_token is not None else measured
        self._us_a_token = known + _SMOOTHING * (measured - known)

    def chunk(self, *, others_decode: bool) -> int:
        """Tokens of the next prefill frame at most."""
        if not others_decode or self._max_step_ms is None:
            return self._chunk
        if self._us_a_token is None:
            return min(_UNKNOWN_CHUNK, self._chunk)
        affordable = int(self._max_step_ms * 1e3 / max(self._us_a_token, 1e-3))
        return max(_LEAST_CHUNK, min(self._chunk, affordable))
