"""Chooses the size of prefill chunks: small enough that stages overlap and that decoding is not delayed too long.

A prompt that has the stages to itself is cut into chunks of equal cost, as many as take the least time in total. Until
costs are known, chunks have equal lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from cluster.core.frames import Compute, StageTiming
from cluster.core.limits import LONG_CHUNK_S
from cluster.core.plan import CHUNK_BLOCK, next_chunk, overlapping_chunk
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.chunk_cost import ChunkCost, ChunkCosts

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
_FIXED_SHARE = 1 / 32
"""A chunk is long enough once its fixed cost is this share of its time; others would wait for a longer one in vain."""


def _few_lengths(tokens: float) -> int:
    """Return the power of two that is nearest to ``tokens`` by ratio, and at least half a block.

    CUDA prepares attention for each new length of a chunk and of its context, which takes longer than the chunk. With
    these few lengths it soon knows them. The rounding makes a prompt slower by a few hundredths at most.
    """
    return max(CHUNK_BLOCK // 2, 1 << round(log2(max(tokens, 1.0))))


class PrefillBudget:
    """Learns a chunk's cost on the slowest stage from the frames that come back, and chooses the next chunk's length.

    While others decode, the cost is per frame and per token, and a chunk's weight grows with its tokens: a hundred
    short prompts tell little about the cost of a long chunk.
    """

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._chunk, self._stages, self._max_step_ms = capacity.chunk, len(capacity.budget), capacity.max_step_ms
        self._costs = ChunkCosts()
        self._frames = self._tokens = self._us = self._tokens_squared = self._tokens_by_us = 0.0
        self._step_us = self._longest = 0.0

    def learn(
        self, compute: Compute | None, tokens: int, timings: Sequence[StageTiming], context: int | None = None
    ) -> None:
        """Learn from a frame that every stage computed: a decode step, or a prompt chunk of ``tokens`` tokens.

        ``context`` is the number of tokens before the chunk; None if it is not known any more.
        """
        if compute is Compute.DECODE:
            us = sum(t.compute_us for t in timings)
            self._step_us += (us - self._step_us) * (_SMOOTHING if self._step_us else 1.0)
        elif compute is Compute.PREFILL:
            self._learn_chunk(tokens, timings)
            if context is not None and timings:
                slowest = max(t.compute_us for t in timings)
                self._costs.learn(context, tokens, slowest, sum(t.compute_us for t in timings) - slowest)

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

    def chunk(self, start: int, context: int, left: int, *, others_decode: bool) -> int:
        """Return the number of tokens in the next chunk of a prompt.

        ``start`` tokens of the prompt needed no prefill; ``context`` tokens are before the chunk, and ``left`` tokens
        have not been sent. While others decode, a chunk takes a stage no longer than the budget, and no longer than all
        stages together take for a decode step. So the time between two tokens at most doubles. If a single token costs
        more than that, chunks have one token; if the fixed cost of a frame does, a few more tokens change little.
        """
        chunk, most = self._best_chunk(start, context, left)
        if not others_decode or self._max_step_ms is None:
            return next_chunk(left, chunk, most)
        return min(left, self._affordable(chunk, self._max_step_ms * 1e3))

    def _best_chunk(self, start: int, context: int, left: int) -> tuple[int, int]:
        """Return the length of a chunk that delays nobody, and the most tokens that it may have."""
        if self._capacity.fixed_chunk:
            return self._chunk, self._chunk
        whole, cost = context - start + left, self._costs.known
        if cost is None:
            return overlapping_chunk(whole, self._stages, self._chunk), self._chunk
        most = self._longest_useful(cost, context)
        return min(most, _few_lengths(cost.even_chunk(start, whole, context))), most

    def _longest_useful(self, cost: ChunkCost, context: int) -> int:
        """Return the most tokens of a chunk. More than the usual number must save time, and need memory."""
        useful = cost.tokens_for(context, cost.fixed / _FIXED_SHARE)
        in_time = cost.tokens_for(context, max(LONG_CHUNK_S * 1e6 / cost.token_us - cost.fixed, 0.0))
        most = min(useful, in_time, _MOST_GROWTH * self._longest)
        return min(self._capacity.max_chunk(context), max(self._chunk, _few_lengths(most)))

    def fixed_cost(self) -> float:
        """Return what a chunk costs the slowest stage beside its tokens, in tokens; 0 until it is known."""
        return self._costs.known.fixed if self._costs.known else 0.0

    def seconds(self, tokens: int) -> float | None:
        """Return how long the slowest stage takes for a prompt of ``tokens`` tokens; None before the first chunk."""
        if not self._frames:
            return None
        fixed_us, us_a_token = self._cost()
        return (-(-tokens // self._chunk) * fixed_us + tokens * us_a_token) / 1e6

    @property
    def weight(self) -> float:
        """How many tokens of late chunks ``seconds`` is based on."""
        return self._tokens

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
