"""How many tokens a prefill frame may carry: few enough that stages overlap, and that nobody waits above the budget."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.frames import Compute, StageTiming
from cluster.core.plan import next_chunk, overlapping_chunk

_SMOOTHING = 0.3
_UNKNOWN_CHUNK = 32
"""Before anything was measured, while others decode."""
_LEAST_CHUNK = 4
"""Tokens that a chunk carries above the budget too, where a frame without any token is what costs the time."""
_LEAST_SPREAD = 0.1
"""Chunks whose lengths differ by less, of their mean, do not tell a frame's cost from a token's."""
_LEAST_SLOPE = 0.01
"""A token costs at least this share of what it does on average; less is noise."""
_MOST_GROWTH = 4
"""A chunk is at most so many times as long as the longest of late: how far a line through short ones can be trusted."""
_LEAST_FRAMES = 2.0
"""A chunk may cost so many times what a frame does without any token: half of its time is work then."""


class PrefillBudget:
    """Learns what a chunk costs the slowest stage, so much a frame and so much a token, from the frames that come back.

    A frame weighs by its tokens: a hundred short prompts say little of what a long chunk takes.
    """

    def __init__(self, chunk: int, stages: int, max_step_ms: float | None) -> None:
        self._chunk, self._stages, self._max_step_ms = chunk, stages, max_step_ms
        self._frames = self._tokens = self._us = self._tokens_squared = self._tokens_by_us = 0.0
        self._step_us = self._longest = 0.0

    def learn(self, compute: Compute | None, tokens: int, timings: Sequence[StageTiming]) -> None:
        """A frame came back, computed by every stage: a decode step, or a chunk of so many tokens of a prompt."""
        if compute is Compute.DECODE:
            us = sum(t.compute_us for t in timings)
            self._step_us += (us - self._step_us) * (_SMOOTHING if self._step_us else 1.0)
        elif compute is Compute.PREFILL:
            self._learn_chunk(tokens, timings)

    def _learn_chunk(self, tokens: int, timings: Sequence[StageTiming]) -> None:
        if not timings or tokens < 1:
            return
        us, kept = max(t.compute_us for t in timings), (1 - _SMOOTHING) ** (tokens / self._chunk)
        self._longest = max(kept * self._longest, tokens)
        self._frames = kept * self._frames + 1
        self._tokens = kept * self._tokens + tokens
        self._us = kept * self._us + us
        self._tokens_squared = kept * self._tokens_squared + tokens * tokens
        self._tokens_by_us = kept * self._tokens_by_us + tokens * us

    def chunk(self, whole: int, left: int, *, others_decode: bool) -> int:
        """Tokens of the next frame, for a prompt of which ``whole`` tokens have to be prefilled, ``left`` still do.

        While others decode it takes a stage no longer than the budget, nor longer than a decode step takes all of them:
        the time between two tokens of theirs doubles at most. Where a single token costs more, it is one at a time;
        where a frame without any does, a few more tokens change little.
        """
        chunk = overlapping_chunk(whole, self._stages, self._chunk)
        if not others_decode or self._max_step_ms is None:
            return next_chunk(left, chunk, self._chunk)
        return min(left, self._affordable(chunk, self._max_step_ms * 1e3))

    def _affordable(self, most: int, budget_us: float) -> int:
        if not self._frames:
            return min(_UNKNOWN_CHUNK, most)
        fixed_us, us_a_token = self._cost()
        if self._step_us:
            budget_us = min(budget_us, max(self._step_us, _LEAST_FRAMES * fixed_us))
        us_a_token = max(us_a_token, 1e-3)
        affordable = int((budget_us - fixed_us) / us_a_token)
        least = max(1, min(_LEAST_CHUNK, int(fixed_us / us_a_token)))
        return max(least, min(most, affordable, int(_MOST_GROWTH * self._longest)))

    def _cost(self) -> tuple[float, float]:
        """Microseconds a frame and a token: a line through what was measured, or all by tokens where lengths differ
        too little to tell the two apart, or where longer frames took less: a long context's, once chunks got shorter.
        """
        tokens, us = self._tokens / self._frames, self._us / self._frames
        spread = self._tokens_squared / self._frames - tokens * tokens
        if spread < (_LEAST_SPREAD * tokens) ** 2:
            return 0.0, us / tokens
        slope = (self._tokens_by_us / self._frames - tokens * us) / spread
        if slope < _LEAST_SLOPE * us / tokens:
            return 0.0, us / tokens
        slope = min(slope, us / tokens)
        return us - slope * tokens, slope
