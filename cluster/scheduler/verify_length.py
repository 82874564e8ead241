"""Decides how many tokens a frame of one sequence verifies: pure arithmetic on step times and acceptance.

A frame of r tokens holds one that is certain and r - 1 guesses, or r guesses if it follows another frame of its
sequence. It yields the tokens up to the first wrong guess. As many frames as there are stages are in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.scheduler.speculation import LapTimes

__all__ = ["choose_verify_length", "mean_token_time"]


def mean_token_time(stages: Sequence[float], hop: float, tokens: int, acceptance: float) -> float:
    """Return the expected time of a token if each frame verifies ``tokens`` tokens.

    ``stages`` are the times of such a frame on each stage, ``hop`` is the time between two stages, and ``acceptance``
    the probability that a guess is right. A token of a frame after a wrong guess takes a whole lap of the ring; later
    frames follow at the pace of the slowest stage.
    """
    times = LapTimes(tuple(stages), hop)
    period = times.period(len(stages))
    if acceptance >= 1:
        return period / tokens
    whole = acceptance**tokens
    return (1 - acceptance) * (times.lap + period * whole / (1 - whole))


def choose_verify_length(steps: Mapping[int, Sequence[float]], hop: float, acceptance: float) -> int:
    """Return the number of tokens per frame with the least expected time of a token; the smallest of equal ones.

    ``steps`` has, for each possible number of tokens, the times of such a frame on each stage. It must have 1: one
    token per frame is the choice unless more are known to be faster.
    """
    return min(steps, key=lambda tokens: (mean_token_time(steps[tokens], hop, tokens, acceptance), tokens))
