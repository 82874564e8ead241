"""What a layout is predicted to do for people: tokens a second for one and for many, and the wait for the first.

It knows stages and hops in seconds. It leaves out sampling, detokenizing and queues, which cost next to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from cluster.core.limits import LANE_ROWS, MANY_USERS, REFERENCE_PROMPT
from cluster.core.plan import Forecast, LayerRange, ModelShape, chunks
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.cost import boundary_bytes, decode_s, prefill_s

__all__ = ["forecast", "hops_s", "token_s"]


def forecast(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    lanes: int | None = None,
) -> Forecast:
    """``lanes`` None is one a stage."""
    one = 1 / token_s(shape, candidates, workers, ranges)
    many = _cycle(shape, candidates, workers, ranges, MANY_USERS, lanes or len(workers))
    prompt = min(REFERENCE_PROMPT, shape.max_context)
    return Forecast(
        one_user=one,
        eight_users=max(one, many),  # they can always take turns
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
    """Seconds of a step's whole way round the ring."""
    stages = sum(decode_s(shape, w.profile, r, rows) for w, r in zip(workers, ranges, strict=True))
    return stages + hops_s(shape, candidates, workers, ranges, rows)


def hops_s(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    tokens: int = 1,
) -> float:
    """Seconds between stages, and to and from the coordinator, for so many tokens in one frame."""
    crossing = (tokens * boundary_bytes(shape, r.start) for r in ranges[1:])
    hops = sum(candidates.hop_s(a, b, n) for (a, b), n in zip(pairwise(workers), crossing, strict=True))
    return hops + candidates.ends_s()


def _cycle(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    users: int,
    lanes: int,
) -> float:
    """Tokens a second of so many users: lanes overlap until the slowest stage is never idle."""
    lanes = min(lanes, users)
    rows = min(-(-users // lanes), LANE_ROWS if shape.batchable else 1)
    slowest = max(decode_s(shape, w.profile, r, rows) for w, r in zip(workers, ranges, strict=True))
    return min(users, lanes * rows) / max(token_s(shape, candidates, workers, ranges, rows), lanes * slowest)


def _first_token_s(
    shape: ModelShape,
    candidates: Candidates,
    workers: Sequence[Candidate],
    ranges: Sequence[LayerRange],
    prompt: int,
) -> float:
    """The first chunk passes all stages, the others follow at the slowest one's pace; then a step makes the token."""
    pieces = chunks(prompt, len(workers))

    def stages_s(chunk: int) -> list[float]:
        return [prefill_s(shape, w.profile, r, chunk) for w, r in zip(workers, ranges, strict=True)]

    first = sum(stages_s(pieces[0])) + hops_s(shape, candidates, workers, ranges, pieces[0])
    others = sum(times * max(stages_s(chunk)) for chunk, times in Counter(pieces[1:]).items())
    return first + others + token_s(shape, candidates, workers, ranges)
