"""Times sums over the ranks of a group, of as few bytes as one token has, and of as many as a prompt's chunk.

All ranks have to measure at once. How many sums there are depends on the time of the first ones, as all ranks agree.
"""

from __future__ import annotations

import time
from typing import Final

import mlx.core as mx

from cluster.core.all_reduce import FEW_BYTES, MANY_BYTES, AllReduce
from cluster.model.process_group import Lockstep
from cluster.model.sharding import Group
from cluster.platform.disturbance import describe_load, describe_spread

__all__ = ["measure_sums"]

FIRST: Final = 4
"""Chains of so many sums, as many times, that prepare the connections and say how long one sum takes."""
ROUNDS: Final = 8
MOST: Final = 80
"""Sums of a round: a model of 70 billion parameters has twice as many in a token."""
ROUND_S: Final = 0.05
"""A round of slower sums has fewer, so that all rounds of both sizes take less than a second."""


def measure_sums(group: Group) -> AllReduce:
    """Return how fast this group adds up, by the fastest chain of sums of each size: others were disturbed.

    A chain is evaluated at once, as the sums of a step are. Every rank has to call this, and waits for all others
    without a limit.
    """
    before = describe_load()
    few, many = (_time_size(group, nbytes) for nbytes in (FEW_BYTES, MANY_BYTES))
    disturbed = before or describe_spread((few, many)) or describe_load()
    noted = _agree(group, float(bool(disturbed))) > 0
    return AllReduce.between(_agree(group, min(few)), _agree(group, min(many)), disturbed=noted)


def _time_size(group: Group, nbytes: int) -> list[float]:
    """Return the seconds of one sum of so many bytes, by round."""
    first_s = _agree(group, min(_time_chain(group, nbytes, FIRST) for _ in range(FIRST)))
    count = max(1, min(MOST, int(ROUND_S / max(first_s, 1e-9))))
    return [_time_chain(group, nbytes, count) for _ in range(ROUNDS)]


def _time_chain(group: Group, nbytes: int, count: int) -> float:
    """Return the seconds of one of ``count`` sums, each of which adds up what the device makes of the one before.

    So each waits for the device, and the device for it, as in a step: Metal's work and a ring's are done by different
    processors, and the change from one to the other may take longer than the sum.
    """
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16  # as models have it there
    array = mx.zeros((nbytes // dtype.size,), dtype)
    mx.eval(array)
    Lockstep(group).meet()
    began = time.perf_counter()
    for _ in range(count):
        array = mx.distributed.all_sum(array * 0.5, group=group)  # type: ignore[arg-type]
    mx.eval(array)
    return (time.perf_counter() - began) / count


def _agree(group: Group, figure: float) -> float:
    """Return the mean of all ranks' figures, which is the same number on each of them."""
    total = mx.distributed.all_sum(mx.array([figure]), group=group)  # type: ignore[arg-type]
    return float(total.sum().item()) / group.size()  # type: ignore[arg-type]
