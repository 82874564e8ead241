"""Signs that a measurement of speed is not worth keeping: load, an uneven pace, a hot machine.

Other programs and heat only make a machine look slower. This module judges; ``cluster.worker`` measures again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from cluster.platform.pmset import FULL_SPEED, thermal_limit

__all__ = ["describe_load", "describe_spread", "processor_share"]

SPIN_S: Final = 0.1
"""Time for which a thread computes to see how much of a processor it gets."""
LEAST_SHARE: Final = 0.8
"""With less of a processor than this, the machine has more to do than it has processors for."""
MAX_SPREAD: Final = 1.5
"""Ratio of the median to the fastest time of a job above which something else ran in between."""


def processor_share() -> float:
    """Return the share of a processor that a computing thread of this process gets, from 0 to 1."""
    began, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < SPIN_S:
        pass
    return min((time.thread_time() - used) / (time.perf_counter() - began), 1.0)


def describe_load(
    share: Callable[[], float] = processor_share,
    load: Callable[[], float] = lambda: os.getloadavg()[0],
    heat: Callable[[], int] = thermal_limit,
) -> str:
    """Return in words why a measurement that begins or ends now would be too slow, or an empty string."""
    got = share()
    if got < LEAST_SHARE:
        return f"other programs left {got:.0%} of a processor"
    processors = os.cpu_count() or 1
    if (waiting := load()) > processors:
        return f"{waiting:.1f} programs ran on {processors} processors"
    if (limit := heat()) < FULL_SPEED:
        return f"the machine is hot and limits its speed to {limit}%"
    return ""


def describe_spread(jobs: Sequence[Sequence[float]]) -> str:
    """Return in words that the times of the same job differ too much, or an empty string."""
    widest = max((median(times) / min(times) for times in jobs if min(times, default=0.0) > 0), default=1.0)
    return f"the same step took {widest:.1f} times as long as the fastest" if widest > MAX_SPREAD else ""
