"""Learns what a prompt chunk costs on the slowest stage, and how many tokens each chunk of a prompt should have.

A chunk costs a fixed part (reading weights, starting kernels), a part for each token, and a part for each pair of a
token and one before it (attention). It knows no requests, budgets or frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import log, sqrt
from typing import Final

import numpy as np

_SMOOTHING: Final = 0.02
"""Weight that a chunk takes from all those before it, so the last fifty or so count."""
_LEAST_CHUNKS: Final = 6.0
"""Chunks to learn from before a cost is known."""
_LEAST_SPREAD: Final = 0.1
"""Minimum relative spread of chunk lengths (of their mean) that separates the fixed cost from that of the tokens."""
_LEAST_MOVE: Final = 2.0
"""A cost is replaced once it has changed by this factor. That makes a prompt slower by a hundredth or less. Prompts of
one length are then cut alike, so that kernels compiled for one serve the next."""
_LEAST_SLOPE: Final = 0.01
"""Minimum cost of a token, as a share of a chunk's average cost per token; a smaller one is noise."""
_UNITS: Final = np.array([1.0, 512.0, 512.0 * 4096.0])
"""Typical sizes of the three parts, so that the fit is well-conditioned."""
_HANDLING_US: Final = 1000.0
"""What a frame costs a stage besides its computation: receiving and sending it."""
_NEGLIGIBLE: Final = (8.0, 4e-6, 0.1)
"""Fixed cost in tokens, cost of a pair in tokens, and other stages' share, below which changes do not matter."""


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """The cost of a chunk on the slowest stage.

    ``token_us``: microseconds per token. ``fixed``: the fixed cost, and ``pair``: the cost of a pair of tokens, both in
    tokens. ``others``: the cost on all other stages together, relative to the slowest.
    """

    token_us: float
    fixed: float
    pair: float
    others: float

    def work(self, context: int, tokens: int) -> float:
        """Return the cost of ``tokens`` tokens after ``context`` others without the fixed part, in tokens."""
        return tokens * (1 + self.pair * (context + tokens / 2))

    def chunk_us(self, context: int, tokens: int) -> float:
        """Return the microseconds of a chunk."""
        return self.token_us * (self.fixed + self.work(context, tokens))

    def even_chunk(self, start: int, whole: int, context: int) -> float:
        """Return the tokens of the chunk after ``context`` tokens, for a prompt that starts with ``start`` known ones.

        ``whole`` tokens follow those. With n chunks of equal cost, the slowest stage computes n fixed parts and all the
        work, and the other stages add one chunk: n * fixed + work + others * (fixed + work / n). This is least for
        n = sqrt(others * work / fixed). Chunks of equal cost become shorter as the context grows.
        """
        work = self.work(start, whole)
        count = max(1.0, round(sqrt(self.others * work / max(self.fixed, 1.0))))
        return self.tokens_for(context, work / count)

    def tokens_for(self, context: int, work: float) -> float:
        """Return how many tokens after ``context`` others cost ``work``."""
        linear = 1 + self.pair * context
        if self.pair * work < 1e-6 * linear * linear:
            return work / linear
        return (sqrt(linear * linear + 2 * self.pair * work) - linear) / self.pair

    def differs(self, other: ChunkCost) -> bool:
        """Return whether chunks should be chosen anew because the cost is not ``other`` any more."""
        floors = (1e-3, *_NEGLIGIBLE)
        pairs = zip(self._figures(), other._figures(), floors, strict=True)
        return any(abs(log(max(a, least) / max(b, least))) > log(_LEAST_MOVE) for a, b, least in pairs)

    def _figures(self) -> tuple[float, ...]:
        return self.token_us, self.fixed, self.pair, self.others


class ChunkCosts:
    """Fits the cost of a chunk to those that came back."""

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._by_us = np.zeros(3)
        self._weight = self._tokens = self._tokens_squared = self._us = self._others = 0.0
        self._known: ChunkCost | None = None

    @property
    def known(self) -> ChunkCost | None:
        """The cost; None until it can be told."""
        return self._known

    def learn(self, context: int, tokens: int, slowest_us: float, others_us: float) -> None:
        """Learn from a chunk of ``tokens`` tokens after ``context`` others. Times are of its stages."""
        if tokens < 1 or slowest_us <= 0:
            return
        kept = 1 - _SMOOTHING
        parts = np.array([1.0, tokens, tokens * (context + tokens / 2)])
        features = parts / _UNITS / slowest_us  # so relative errors count
        self._products = kept * self._products + np.outer(features, features)
        self._by_us = kept * self._by_us + features
        self._weight = kept * self._weight + 1
        self._tokens = kept * self._tokens + tokens
        self._us = kept * self._us + slowest_us
        self._tokens_squared = kept * self._tokens_squared + tokens * tokens
        self._others = kept * self._others + others_us / slowest_us
        self._settle()

    def _settle(self) -> None:
        mean = self._tokens / self._weight
        spread = self._tokens_squared / self._weight - mean * mean
        if self._weight < _LEAST_CHUNKS or spread < (_LEAST_SPREAD * mean) ** 2:
            return
        fixed_us, token_us, pair_us = self._fit()
        token_us = max(token_us, _LEAST_SLOPE * self._us / self._tokens)
        fixed = (fixed_us + _HANDLING_US) / token_us
        found = ChunkCost(token_us, fixed, pair_us / token_us, self._others / self._weight)
        if self._known is None or found.differs(self._known):
            self._known = found

    def _fit(self) -> tuple[float, float, float]:
        """Return the microseconds per chunk, token and pair that fit best; none of them is negative."""
        best, least = (0.0, 0.0, 0.0), 0.0
        for count in (3, 2, 1):
            for used in map(list, combinations(range(3), count)):
                try:
                    solved = np.linalg.solve(self._products[np.ix_(used, used)], self._by_us[used])
                except np.linalg.LinAlgError:
                    continue
                error = -float(solved @ self._by_us[used])  # the squared error, less a constant
                if (solved >= 0).all() and error < least:
                    full = np.zeros(3)
                    full[used] = solved / _UNITS[used]
                    best, least = (float(full[0]), float(full[1]), float(full[2])), error
        return best
