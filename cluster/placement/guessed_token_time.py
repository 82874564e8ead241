"""Predicts one user's time per token if tokens are guessed ahead, with as many frames in flight as there are stages.

The time for which wrong guesses hold a stage makes a slow first stage dear, so layers should grow towards the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.lap_times import LapTimes, mean_token_time, run_token_time

__all__ = ["guessed_token_s", "steady_token_s"]


def steady_token_s(lap_s: float, slowest_s: float, stages: int, acceptance: float) -> float:
    """Return the expected seconds of a token, without the time that a wrong guess holds a stage."""
    return run_token_time(lap_s, max(slowest_s, lap_s / stages), acceptance)


def guessed_token_s(stages_s: Sequence[float], hops_s: float, acceptance: float) -> float:
    """Return the expected seconds of a token. ``hops_s`` is the sum of all hops of a lap.

    An ``acceptance`` of 0 means no guesses. A stage that is infinitely slow makes it infinite.
    """
    times = LapTimes(tuple(stages_s), hops_s / (len(stages_s) + 1))
    return mean_token_time(times, len(stages_s) if acceptance else 1, acceptance)
