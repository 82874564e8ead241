"""Proposes a layout for a model and some workers, with a forecast and reasons. Decides; loads nothing.

There are three cases:

- Layer ranges are given: they are checked, and the best workers for them are chosen.
- The speed of every worker is known: the search finds the best layout over any of the workers (``search``).
- A speed is unknown: the layers are split by memory over all workers that are large enough, in their given order
  (``memory_split``).

After a loss, ``coordinator.replan`` asks again with the layer ranges or the number of workers that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.core.errors import NoPlan
from cluster.core.plan import Forecast, LayerRange, ModelShape, Objective, Spare
from cluster.placement import explain
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.memory_split import check_cuts, place_on_largest, require_fit, solve
from cluster.placement.search import Search
from cluster.placement.stage_table import StageTable

__all__ = [
    "SEQUENCES",
    "ChosenLayout",
    "PlanRequest",
    "Proposal",
    "choose_layout",
    "describe_layout",
    "explain_layout",
    "propose",
    "search_layouts",
]

ChosenLayout: TypeAlias = tuple[tuple[Candidate, ...], tuple[LayerRange, ...]]
"""The workers and their layers, in pipeline order."""

SEQUENCES = 1
"""Number of full-length sequences whose caches must fit on every stage."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The user's request: objective, number of stages, layers of each worker in order, and number of lanes.

    None leaves a choice to the planner. ``acceptance`` is the share of guessed tokens that are expected to be right; 0
    counts on no guesses. It only changes plans for ``LATENCY``.
    """

    objective: Objective = Objective.LATENCY
    stage_count: int | None = None
    layers: tuple[LayerRange, ...] | None = None
    lanes: int | None = None
    acceptance: float = 0.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """The proposed workers and their layers, in pipeline order.

    ``decode_s`` has the seconds per decode step of each stage; it is zero for a worker of unknown speed. ``forecast``
    is None if any speed is unknown.
    """

    workers: tuple[Candidate, ...]
    ranges: tuple[LayerRange, ...]
    decode_s: tuple[float, ...]
    forecast: Forecast | None
    spares: tuple[Spare, ...]
    reasons: tuple[str, ...]


def propose(shape: ModelShape, candidates: Candidates, request: PlanRequest) -> Proposal:
    """Propose a layout.

    Raise ``NoPlan`` for too few clean cuts or invalid layer ranges, and ``DoesNotFit`` with the missing GiB.
    """
    search = search_layouts(shape, candidates, request)
    return explain_layout(shape, candidates, request, choose_layout(shape, candidates, request, search), search)


def choose_layout(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, search: Search | None
) -> ChosenLayout:
    """Return the workers and the layers that ``propose`` proposes. ``search`` is that of ``search_layouts``.

    Raise as ``propose``.
    """
    if request.layers:
        return _use_given_ranges(shape, candidates, request, request.layers)
    found = search.best(stage_count=request.stage_count) if search else None
    if found is not None:
        return found.workers, found.ranges
    return _split_by_memory(shape, candidates, request)  # with known speeds, its error says what is missing


def search_layouts(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, table: StageTable | None = None
) -> Search | None:
    """Return a search of the model's layouts; None if the speed of a worker is not known.

    ``table`` is that of the model and ``SEQUENCES``, for a caller who searches often.
    """
    return _search(shape, candidates, request, table) if candidates.known else None


def _use_given_ranges(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, layers: tuple[LayerRange, ...]
) -> ChosenLayout:
    """Choose workers for the given ranges, checked by the same rules.

    If there are as many workers as ranges, they take the ranges in order. If there are more, the best workers do, and
    the others are spare.
    """
    check_cuts(shape, layers)
    if request.stage_count not in (None, len(layers)):
        raise NoPlan(
            f"{_count_ranges(len(layers))} given, but --workers {request.stage_count}; give as many ranges as workers, "
            "or omit one of the two"
        )
    if len(layers) > len(candidates.workers):
        count = len(candidates.workers)
        raise NoPlan(
            f"{_count_ranges(len(layers))} given, but there {'are' if count != 1 else 'is'} {count} "
            f"worker{'s' * (count != 1)}; give fewer ranges, or add a worker"
        )
    workers = _choose_workers(shape, candidates, request, layers)
    require_fit(shape, [w.memory for w in workers], layers, SEQUENCES)
    return workers, layers


def _choose_workers(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, layers: Sequence[LayerRange]
) -> tuple[Candidate, ...]:
    """Return the workers for the given ranges. If there are more workers, choose the best ones in their best order."""
    if len(layers) == len(candidates.workers):
        return tuple(candidates.workers)
    if candidates.known:
        only_these_cuts = replace(shape, clean_cuts=tuple(r.start for r in layers[1:]))
        found = _search(only_these_cuts, candidates, request).best(stage_count=len(layers))
        if found is not None:
            return found.workers
    return _largest(candidates, len(layers))


def _search(shape: ModelShape, candidates: Candidates, request: PlanRequest, table: StageTable | None = None) -> Search:
    return Search(table or StageTable(shape, SEQUENCES), candidates, request.objective, acceptance=request.acceptance)


def _count_ranges(ranges: int) -> str:
    return f"{ranges} layer range{'s were' if ranges != 1 else ' was'}"


def _split_by_memory(shape: ModelShape, candidates: Candidates, request: PlanRequest) -> ChosenLayout:
    """Choose a split by memory over as many of the largest workers as requested.

    Without a request, use all workers, except the smallest ones that the model does not fit on.
    """
    if request.stage_count:
        chosen = _largest(candidates, request.stage_count)
        return chosen, _solve(shape, chosen)
    most = min(len(candidates.workers), len(shape.clean_cuts) + 1) if candidates.known else None
    return place_on_largest(
        _largest(candidates, most), lambda w: w.memory.usable, lambda workers: (tuple(workers), _solve(shape, workers))
    )


def _solve(shape: ModelShape, workers: Sequence[Candidate]) -> tuple[LayerRange, ...]:
    return solve(shape, [w.memory for w in workers], SEQUENCES)


def _largest(candidates: Candidates, most: int | None) -> tuple[Candidate, ...]:
    """Return the ``most`` workers with the most memory, in their given order; all workers for None."""
    largest = sorted(candidates.workers, key=lambda w: -w.memory.usable)[:most]
    return tuple(w for w in candidates.workers if w in largest)


def explain_layout(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, chosen: ChosenLayout, search: Search | None
) -> Proposal:
    """Return the proposal of a chosen layout. Its reasons name the layout that the search prefers, if it is another."""
    workers, ranges = chosen
    layout = describe_layout(shape, candidates, request, chosen)
    return Proposal(
        workers,
        ranges,
        tuple(w.decode_s(shape, r) for w, r in zip(workers, ranges, strict=True)),
        layout.forecast if candidates.known else None,
        explain.spares(layout, search, _explain_worker_limit(request)),
        explain.reasons(layout, search) if search else (explain.unknown(candidates),),
    )


def describe_layout(
    shape: ModelShape, candidates: Candidates, request: PlanRequest, chosen: ChosenLayout
) -> explain.Layout:
    """Return a chosen layout with all that its speed depends on."""
    acceptance = request.acceptance if request.objective is Objective.LATENCY else 0.0
    return explain.Layout(shape, candidates, *chosen, request.objective, acceptance, request.lanes)


def _explain_worker_limit(request: PlanRequest) -> str:
    """Return why no more workers are used, if the user limited their number, else an empty string."""
    if request.layers:
        return f"{_count_ranges(len(request.layers))} given"
    count = request.stage_count
    return f"{count} worker{'s were' if count != 1 else ' was'} asked for" if count else ""
