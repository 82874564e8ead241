"""Predicts a layout's performance: tokens per second for one user and for many, and the time to the first token.

It adds up the seconds of stages and hops. It leaves out sampling, detokenizing and queues, which cost next to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from cluster.core.limits import LANE_ROWS, MANY_USERS, REFERENCE_PROMPT
from cluster.core.plan import Forecast, LayerRange, ModelShape, chunks
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.guessed_token_time import guessed_token_s
from cluster.placement.predicted_step_time import boundary_bytes

__all__ = ["forecast", "hops_s", "token_s"]


def forecast(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    lanes: int | None = None,
    acceptance: float = 0.0,
) -> Forecast:
    """Return the forecast for a layout. ``lanes`` None means one lane per stage.

    For one user, tokens are guessed, and guesses are right as often as ``acceptance``; 0 counts on no guesses.
    """
    stages = [w.decode_s(shape, r) for w, r in zip(workers, ranges, strict=True)]
    one = 1 / guessed_token_s(stages, hops_s(shape, candidates, workers, ranges), acceptance)
    many = _tokens_per_second(shape, candidates, workers, ranges, MANY_USERS, lanes or len(workers))
    prompt = min(REFERENCE_PROMPT, shape.max_context)
    return Forecast(
        one_user=one,
        eight_users=max(one, many),  # users can always take turns, so many are never slower than one
        first_token_s=_first_token_s(shape, candidates, workers, ranges, prompt),
        prompt_tokens=prompt,
    )


def token_s(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    rows: int = 1,
) -> float:
    """Return the seconds of one decode step through the whole ring."""
    stages = sum(w.decode_s(shape, r, rows) for w, r in zip(workers, ranges, strict=True))
    return stages + hops_s(shape, candidates, workers, ranges, rows)


def hops_s(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    tokens: int = 1,
) -> float:
    """Return the seconds of all hops of a frame with ``tokens`` tokens, including those to and from the coordinator."""
    crossing = (tokens * boundary_bytes(shape, r.start) for r in ranges[1:])
    hops = sum(candidates.hop_s(a, b, n) for (a, b), n in zip(pairwise(workers), crossing, strict=True))
    return hops + candidates.ends_s()


def _tokens_per_second(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    users: int,
    lanes: int,
) -> float:
    """Return the total tokens per second of ``users`` users. Lanes overlap until the slowest stage is never idle."""
    lanes = min(lanes, users)
    rows = min(-(-users // lanes), LANE_ROWS if shape.batchable else 1)
    slowest = max(w.decode_s(shape, r, rows) for w, r in zip(workers, ranges, strict=True))
    return min(users, lanes * rows) / max(token_s(shape, candidates, workers, ranges, rows), lanes * slowest)


def _first_token_s(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    prompt: int,
) -> float:
    """Return the seconds to the first token.

    The first chunk passes all stages, the others follow at the pace of the slowest stage, and a decode step produces
    the token.
    """
    pieces = chunks(prompt, len(workers))

    def stages_s(chunk: int) -> list[float]:
        return [w.prefill_s(shape, r, chunk) for w, r in zip(workers, ranges, strict=True)]

    first = sum(stages_s(pieces[0])) + hops_s(shape, candidates, workers, ranges, pieces[0])
    others = sum(times * max(stages_s(chunk)) for chunk, times in Counter(pieces[1:]).items())
    return first + others + token_s(shape, candidates, workers, ranges)
