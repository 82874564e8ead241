"""How many tokens a prefill frame may carry: few enough that stages overlap, and that nobody waits above the budget."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.types import StageTiming

_SMOOTHING = 0.3
_UNKNOWN_CHUNK = 32
"""Before anything was measured, while others decode."""
_LEAST_CHUNK = 4
_FILLS = 4
"""A prompt goes out in so many chunks a stage: filling and draining the pipeline costs 1 / _FILLS of its time then."""
_LEAST_SPLIT = 128
"""A shorter chunk would lose more to thin matrices than overlap wins."""


class Pacing:
    """Learns the slowest stage's microseconds a token from the frames that come back."""

    def __init__(self, chunk: int, stages: int, max_step_ms: float | None) -> None:
        self._chunk, self._stages, self._max_step_ms = chunk, stages, max_step_ms
        self._us_a_token: float | None = None

    def learn(self, tokens: int, timings: Sequence[StageTiming]) -> None:
        """A prefill frame of so many tokens came back."""
        if not timings or tokens < _LEAST_CHUNK:
            return
        measured = max(t.compute_us for t in timings) / tokens
        known = self._us_a_token if self._us_a_token is not None else measured
        self._us_a_token = known + _SMOOTHING * (measured - known)

    def chunk(self, whole: int, *, others_decode: bool) -> int:
        """Tokens of the next frame at most, for a prompt of which ``whole`` tokens have to be prefilled."""
        chunk = self._overlapping(whole)
        if not others_decode or self._max_step_ms is None:
            return chunk
        if self._us_a_token is None:
            return min(_UNKNOWN_CHUNK, chunk)
        affordable = int(self._max_step_ms * 1e3 / max(self._us_a_token, 1e-3))
        return max(_LEAST_CHUNK, min(chunk, affordable))

    def _overlapping(self, whole: int) -> int:
        if self._stages == 1:
            return self._chunk
        return min(self._chunk, max(_LEAST_SPLIT, whole // (_FILLS * self._stages)))
