"""Decides how many tokens a frame of one sequence verifies: pure arithmetic on step times and acceptance.

A frame of r tokens holds one that is certain and r - 1 guesses, or r guesses if it follows another frame of its
sequence. It yields the tokens up to the first wrong guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cluster.core.lap_times import LapTimes, mean_token_time
from cluster.scheduler.guess_window import GUESS_COST, LEAST_GAIN, choose_window

__all__ = ["Depth", "choose_depth"]


class Depth(NamedTuple):
    """How far guesses reach: ``window`` frames may be in flight, of ``tokens`` tokens each."""

    window: int = 1
    tokens: int = 1


def choose_depth(steps: Mapping[int, LapTimes], acceptance: float, most: int) -> Depth:
    """Return the depth with the least expected time of a token, with at most ``most`` frames in flight.

    ``steps`` has the times of a frame of each possible number of tokens. It must have 1: one token per frame is the
    choice unless more are clearly faster.
    """
    single = Depth(choose_window(steps[1], acceptance, most))
    windows = range(1, min(most, len(steps[1].stages)) + 1)
    deeper = [Depth(window, tokens) for tokens in sorted(steps) if tokens > 1 for window in windows]

    def expected(depth: Depth) -> float:
        times = steps[depth.tokens]
        cost = (1 - acceptance) * GUESS_COST * times.lap if depth.window > 1 else 0.0
        return mean_token_time(times, depth.window, acceptance, depth.tokens) + cost

    best = min(deeper, key=expected, default=single)
    return best if expected(best) <= (1 - LEAST_GAIN) * expected(single) else single
