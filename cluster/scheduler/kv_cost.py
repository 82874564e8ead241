"""Computes the worst-case KV cache memory of sequences on each stage, before they are admitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Cost = tuple[int, ...]
"""Bytes, one entry per stage."""

CostOf = Callable[[int], Cost]
"""Returns the maximum size, with the given number of tokens, of one sequence's caches or of a mark."""


def lane_cost(lengths: Sequence[int], cost_of: CostOf) -> Cost:
    """Return the worst-case cache size of a lane. A batch pads every sequence to the length of the longest."""
    longest = cost_of(max(lengths))
    return tuple(len(lengths) * nbytes for nbytes in longest)


def total(costs: Iterable[Cost], stages: int) -> Cost:
    """Return the sum over lanes or sequences, per stage."""
    sums = [0] * stages
    for cost in costs:
        for i, nbytes in enumerate(cost):
            sums[i] += nbytes
    return tuple(sums)


def fits(cost: Cost, budget: Cost) -> bool:
    return all(c <= b for c, b in zip(cost, budget, strict=True))
