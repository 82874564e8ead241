"""Predicts one user's time per token if tokens are guessed ahead.

As many frames as there are stages are in flight, each with one guess behind the last certain token. A right guess takes
the time between two frames; a wrong one takes a lap of the ring, and the time for which the frames behind it still hold
a stage. The last stage skips those at once, but another stage finishes the one that it computes. So a slow last stage
costs little and a slow first stage costs much, and layers should grow towards the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf

__all__ = ["guessed_token_s", "steady_token_s"]


def steady_token_s(lap_s: float, slowest_s: float, stages: int, acceptance: float) -> float:
    """Return the expected seconds of a token, without the time that a wrong guess holds a stage."""
    return (1 - acceptance) * lap_s + acceptance * max(slowest_s, lap_s / stages)


def guessed_token_s(stages_s: Sequence[float], hops_s: float, acceptance: float) -> float:
    """Return the expected seconds of a token. ``hops_s`` is the sum of all hops of a lap.

    A stage that is infinitely slow makes it infinite.
    """
    lap_s = sum(stages_s) + hops_s
    if lap_s == inf:
        return inf
    held_s = _held_s(stages_s, lap_s) if acceptance else 0.0
    return steady_token_s(lap_s, max(stages_s), len(stages_s), acceptance) + (1 - acceptance) * held_s


def _held_s(stages_s: Sequence[float], lap_s: float) -> float:
    """Return by how many seconds frames behind a wrong guess delay the frame after it.

    At each stage the frames follow the first one at the pace of the slowest stage so far. The next certain frame comes
    a lap after the first one. The frame that the stage computes then must end first.
    """
    held = 0.0
    for seconds, pace in zip(stages_s[:-1], accumulate(stages_s[:-1], max), strict=True):
        last = min(len(stages_s) - 1, int(lap_s / pace)) if pace else 0
        held = max(held, last * pace + seconds - lap_s)
    return held
