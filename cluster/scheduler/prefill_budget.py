"""Chooses the size of prefill chunks: small enough that stages overlap and that decoding is not delayed too long."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.frames import Compute, StageTiming
from cluster.core.plan import next_chunk, overlapping_chunk

_SMOOTHING = 0.3
_UNKNOWN_CHUNK = 32
"""Tokens per chunk while others decode and nothing has been measured yet."""
_LEAST_CHUNK = 4
"""Minimum tokens per chunk, even above the budget, if the fixed cost of a frame dominates."""
_LEAST_SPREAD = 0.1
"""Minimum relative spread of chunk lengths (of their mean) that separates the cost per frame from that per token."""
_LEAST_SLOPE = 0.01
"""Minimum marginal cost of a token, as a share of its average cost; a smaller slope is noise."""
_MOST_GROWTH = 4
"""Maximum ratio of a chunk to the longest recent one: a line fitted to short chunks is not trusted further."""
_LEAST_FRAMES = 2.0
"""A chunk may always cost this many times a frame's fixed cost, so that half of its time is useful work."""


class PrefillBudget:
    """Learns a chunk's cost on the slowest stage, per frame and per token, from the frames that come back.

    A chunk's weight grows with its tokens: a hundred short prompts tell little about the cost of a long chunk.
    """

    def __init__(self, chunk: int, stages: int, max_step_ms: float | None) -> None:
        self._chunk, self._stages, self._max_step_ms = chunk, stages, max_step_ms
        self._frames = self._tokens = self._us = self._tokens_squared = self._tokens_by_us = 0.0
        self._step_us = self._longest = 0.0

    def learn(self, compute: Compute | None, tokens: int, timings: Sequence[StageTiming]) -> None:
        """Learn from a frame that every stage computed: a decode step, or a prompt chunk of ``tokens`` tokens."""
        if compute is Compute.DECODE:
            us = sum(t.compute_us for t in timings)
            self._step_us += (us - self._step_us) * (_SMOOTHING if self._step_us else 1.0)
        elif compute is Compute.PREFILL:
            self._learn_chunk(tokens, timings)

    def _learn_chunk(self, tokens: int, timings: Sequence[StageTiming]) -> None:
        if not timings or tokens < 1:
            return
        us = max(t.compute_us for t in timings)
        kept = (1 - _SMOOTHING) ** (tokens / self._chunk)
        self._longest = max(kept * self._longest, tokens)
        self._frames = kept * self._frames + 1
        self._tokens = kept * self._tokens + tokens
        self._us = kept * self._us + us
        self._tokens_squared = kept * self._tokens_squared + tokens * tokens
        self._tokens_by_us = kept * self._tokens_by_us + tokens * us

    def chunk(self, whole: int, left: int, *, others_decode: bool) -> int:
        """Return the number of tokens in the next chunk of a prompt.

        ``whole`` tokens of the prompt need prefill; ``left`` of them have not been sent. While others decode, a chunk
        takes a stage no longer than the budget, and no longer than all stages together take for a decode step. So the
        time between two tokens at most doubles. If a single token costs more than that, chunks have one token; if the
        fixed cost of a frame does, a few more tokens change little.
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
        """Return the microseconds per frame and per token: a line fitted to the measured chunks.

        The whole cost is attributed to the tokens if the lengths differ too little to separate the two, or if longer
        chunks took less time. The latter happens when a long context slows down chunks that have become shorter.
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
