"""What sequences take of each stage's memory, in the worst case, before they are admitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Cost = tuple[int, ...]
"""Bytes, one entry a stage."""

CostOf = Callable[[int], Cost]
"""What the caches of one sequence of so many tokens take at most."""


def lane_cost(lengths: Sequence[int], cost_of: CostOf) -> Cost:
    """A lane's caches at their worst: a batch pads every sequence to the longest of them."""
    longest = cost_of(max(lengths))
    return tuple(len(lengths) * nbytes for nbytes in longest)


def total(costs: Iterable[Cost], stages: int) -> Cost:
    """The sum over lanes or sequences, stage by stage."""
    sums = [0] * stages
    for cost in costs:
        for i, nbytes in enumerate(cost):
            sums[i] += nbytes
    return tuple(sums)


def fits(cost: Cost, budget: Cost) -> bool:
    return all(c <= b for c, b in zip(cost, budget, strict=True))
