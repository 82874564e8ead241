"""From a model's shape and some workers to a layout with its forecast and its reasons. Decides; loads nothing.

Where every worker's speed is known the search finds the best layout of any of them; where one is not, all of them are
used, in their order, as full as each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.core.errors import NoPlan
from cluster.core.plan import Forecast, LayerRange, ModelShape, Objective, Spare
from cluster.placement import explain
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.cost import decode_s
from cluster.placement.forecast import forecast
from cluster.placement.memory_split import check, check_cuts, solve
from cluster.placement.search import Search
from cluster.placement.stage_table import StageTable

__all__ = ["PlanRequest", "Proposal", "propose"]

SEQUENCES = 1
"""Full-length sequences for whose caches every stage keeps room."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a person asked for: an objective, a number of stages, the layers of each worker in order, lanes."""

    objective: Objective = Objective.LATENCY
    stages: int | None = None
    layers: tuple[LayerRange, ...] | None = None
    lanes: int | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Who holds what, in pipeline order. ``decode_s`` has a stage's seconds a step; ``forecast`` is None and
    ``decode_s`` zero where a speed is not known.
    """

    workers: tuple[Candidate, ...]
    ranges: tuple[LayerRange, ...]
    decode_s: tuple[float, ...]
    forecast: Forecast | None
    spares: tuple[Spare, ...]
    reasons: tuple[str, ...]


def propose(shape: ModelShape, candidates: Candidates, wish: PlanRequest) -> Proposal:
    """Raises ``NoPlan`` (cuts, or layers that make no sense) and ``DoesNotFit`` with the GiB that are missing."""
    if wish.layers:
        return _as_told(shape, candidates, wish, wish.layers)
    if not candidates.known:
        return _by_memory(shape, candidates, wish)
    search = Search(StageTable(shape, SEQUENCES), candidates, wish.objective)
    found = search.best(stages=wish.stages)
    if found is None:
        return _by_memory(shape, candidates, wish)  # which says what is missing
    return _proposal(shape, candidates, wish, found.workers, found.ranges, search)


def _as_told(shape: ModelShape, candidates: Candidates, wish: PlanRequest, layers: Sequence[LayerRange]) -> Proposal:
    """The given ranges, held to the same rules; what the search would do instead is said.

    As many workers as ranges take them in their order; of more, the best do, and the others are spare.
    """
    check_cuts(shape, layers)
    if wish.stages not in (None, len(layers)):
        raise NoPlan(
            f"{_count_ranges(len(layers))} given and --workers {wish.stages}; give as many ranges as workers,"
            " or leave one of the two out"
        )
    if len(layers) > len(candidates.workers):
        there = len(candidates.workers)
        raise NoPlan(
            f"{_count_ranges(len(layers))} given, and there {'are' if there != 1 else 'is'} {there} "
            f"worker{'s' * (there != 1)}; give fewer ranges, or add a worker"
        )
    workers = _holders(shape, candidates, wish, layers)
    check(shape, [w.room for w in workers], layers, SEQUENCES)
    search = Search(StageTable(shape, SEQUENCES), candidates, wish.objective) if candidates.known else None
    return _proposal(shape, candidates, wish, workers, tuple(layers), search)


def _holders(
    shape: ModelShape, candidates: Candidates, wish: PlanRequest, layers: Sequence[LayerRange]
) -> tuple[Candidate, ...]:
    """Who takes the given ranges: of more workers than ranges those that do it best, in their best order."""
    if len(layers) == len(candidates.workers):
        return tuple(candidates.workers)
    if candidates.known:
        cut_so = replace(shape, clean_cuts=tuple(r.start for r in layers[1:]))
        found = Search(StageTable(cut_so, SEQUENCES), candidates, wish.objective).best(stages=len(layers))
        if found is not None:
            return found.workers
    return _largest(candidates, len(layers))


def _count_ranges(ranges: int) -> str:
    return f"{ranges} layer range{'s were' if ranges != 1 else ' was'}"


def _by_memory(shape: ModelShape, candidates: Candidates, wish: PlanRequest) -> Proposal:
    """All workers, or the largest of them where fewer stages are wanted or there are too few cuts."""
    most = wish.stages or (min(len(candidates.workers), len(shape.clean_cuts) + 1) if candidates.known else None)
    chosen = _largest(candidates, most)
    ranges = solve(shape, [w.room for w in chosen], SEQUENCES)
    return _proposal(shape, candidates, wish, chosen, ranges, None)


def _largest(candidates: Candidates, most: int | None) -> tuple[Candidate, ...]:
    """So many workers, those with the most memory, in the order in which they are given."""
    largest = sorted(candidates.workers, key=lambda w: -w.room.usable)[:most]
    return tuple(w for w in candidates.workers if w in largest)


def _proposal(
    shape: ModelShape,
    candidates: Candidates,
    wish: PlanRequest,
    workers: tuple[Candidate, ...],
    ranges: tuple[LayerRange, ...],
    search: Search | None,
) -> Proposal:
    known = candidates.known
    told = explain.Layout(shape, candidates, workers, ranges, wish.objective)
    return Proposal(
        workers,
        ranges,
        tuple(decode_s(shape, w.profile, r) for w, r in zip(workers, ranges, strict=True)),
        forecast(shape, candidates, workers, ranges, wish.lanes) if known else None,
        explain.spares(told, search, _explain_worker_limit(wish)),
        explain.reasons(told, search) if known else (explain.unknown(candidates),),
    )


def _explain_worker_limit(wish: PlanRequest) -> str:
    """Why no more workers are used, where a person said how many."""
    if wish.layers:
        return f"{_count_ranges(len(wish.layers))} given"
    return f"{wish.stages} worker{'s were' if wish.stages != 1 else ' was'} asked for" if wish.stages else ""
