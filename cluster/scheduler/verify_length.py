"""Decides how many tokens a frame of one sequence verifies: pure arithmetic on step times and acceptance.

A frame of r tokens holds one that is certain and r - 1 guesses, or r guesses if it follows another frame of its
sequence. It yields the tokens up to the first wrong guess. As many frames as there are stages are in flight.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.core.lap_times import LapTimes, mean_token_time

__all__ = ["choose_verify_length"]


def choose_verify_length(steps: Mapping[int, LapTimes], acceptance: float) -> int:
    """Return the number of tokens per frame with the least expected time of a token; the smallest of equal ones.

    ``steps`` has the times of a frame of each possible number of tokens. It must have 1: one token per frame is the
    choice unless more are known to be faster.
    """

    def expected(tokens: int) -> float:
        times = steps[tokens]
        return mean_token_time(times, len(times.stages), acceptance, tokens)

    return min(steps, key=lambda tokens: (expected(tokens), tokens))
