"""From a model's shape and some workers to a layout with its forecast and its reasons. Decides; loads nothing.

Where every worker's speed is known the search finds the best layout of any of them; where one is not, all of them are
used, in their order, as full as each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import NoPlan
from cluster.placement import explain
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.cost import decode_s
from cluster.placement.forecast import forecast
from cluster.placement.search import Search
from cluster.placement.solve import check, solve
from cluster.placement.table import StageTable
from cluster.profiles import Forecast, Objective, Spare
from cluster.types import LayerRange, ModelShape

__all__ = ["Proposal", "Wish", "propose"]

SEQUENCES = 1
"""Full-length sequences for whose caches every stage keeps room."""


@dataclass(frozen=True, slots=True)
class Wish:
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


def propose(shape: ModelShape, candidates: Candidates, wish: Wish) -> Proposal:
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


def _as_told(shape: ModelShape, candidates: Candidates, wish: Wish, layers: Sequence[LayerRange]) -> Proposal:
    """The given ranges, held to the same rules; what the search would do instead is said."""
    if wish.stages not in (None, len(layers)):
        raise NoPlan(f"{len(layers)} layer ranges were given and --workers {wish.stages}; leave one of them out")
    if len(layers) != len(candidates.workers):
        raise NoPlan(
            f"{len(layers)} layer ranges were given for {len(candidates.workers)} workers; give one range for each"
        )
    check(shape, candidates.rooms, layers, SEQUENCES)
    search = Search(StageTable(shape, SEQUENCES), candidates, wish.objective) if candidates.known else None
    return _proposal(shape, candidates, wish, tuple(candidates.workers), tuple(layers), search)


def _by_memory(shape: ModelShape, candidates: Candidates, wish: Wish) -> Proposal:
    """All workers, or the largest of them where fewer stages are wanted or there are too few cuts."""
    most = wish.stages or (min(len(candidates.workers), len(shape.clean_cuts) + 1) if candidates.known else None)
    largest = sorted(candidates.workers, key=lambda w: -w.room.usable)[:most]
    chosen = tuple(w for w in candidates.workers if w in largest)
    ranges = solve(shape, [w.room for w in chosen], SEQUENCES)
    return _proposal(shape, candidates, wish, chosen, ranges, None)


def _proposal(
    shape: ModelShape,
    candidates: Candidates,
    wish: Wish,
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
        explain.spares(told, search, wish.stages),
        explain.reasons(told, search) if known else (explain.unknown(candidates),),
    )
