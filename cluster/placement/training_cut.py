"""Cuts a model for training, where a layer costs more if its batch also comes back. Pure; it moves no layer itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import inf

from cluster.core.plan import LayerRange, ModelShape

__all__ = ["cut_for_training", "head_cost"]


def cut_for_training(
    layers: int, cuts: Sequence[int], speeds: Sequence[float], trained: int, *, recompute: bool, head: float = 0.0
) -> tuple[LayerRange, ...]:
    """Return a range of layers for each of ``speeds``, in their order, so that the slowest stage is as fast as can be.

    ``cuts`` are the layers before which the model may be cut. A layer's forward costs one, the way back of the last
    ``trained`` layers another one, and one more if they ``recompute``. ``head`` is that of the head's forward; its way
    back costs as much. Without enough cuts, the last stages get none.
    """
    back = 2 if recompute else 1
    costs = [1.0 + (back if layer >= layers - trained else 0) for layer in range(layers)]
    costs[-1] += 2 * head
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    bounds = (0, *cuts, layers)
    count = min(len(speeds), len(cuts) + 1)

    @cache
    def best(stage: int, begin: int) -> tuple[float, tuple[int, ...]]:
        """Return the slowest stage's time from ``stage`` on, which begins at that bound, and where the stages end."""
        if stage == count - 1:
            return (sums[layers] - sums[bounds[begin]]) / speeds[stage], (len(bounds) - 1,)
        found: tuple[float, tuple[int, ...]] = (inf, ())
        for end in range(begin + 1, len(bounds) - (count - stage - 1)):
            later, ends = best(stage + 1, end)
            own = (sums[bounds[end]] - sums[bounds[begin]]) / speeds[stage]
            found = min(found, (max(own, later), (end, *ends)))
        return found

    ends = best(0, 0)[1]
    return tuple(LayerRange(bounds[a], bounds[b]) for a, b in zip((0, *ends), ends, strict=False))


def head_cost(shape: ModelShape) -> float:
    """Return the cost of a model's head, in layers: what is shared with the last layer, by bytes that a token reads."""
    head = sum(weight.nbytes for weight in shape.shared if shape.layers - 1 in weight.layers)
    layers = shape.active_bytes or shape.layer_bytes
    return head * len(layers) / max(sum(layers), 1)
