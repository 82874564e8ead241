"""Who takes over when a stage is lost: the next epoch's plan. Decides; loads nothing.

In this order: the same workers, where all are back; a spare for each that is not; a new cut over those who are left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.coordinator.planner import make_plan
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit, NoWorkers
from cluster.core.plan import LayerRange, ModelShape, Plan, PlannedStage
from cluster.core.worker import WorkerInfo


@dataclass(frozen=True, slots=True)
class Assignment:
    """The plan of the next epoch, and the workers of its stages in order."""

    plan: Plan
    workers: tuple[WorkerInfo, ...]


def reassign_layers(
    epoch: int,
    plan: Plan,
    shape: ModelShape,
    order: LoadOrder,
    members: Iterable[RosterEntry],
    without: Collection[str] = (),
) -> Assignment:
    """Raises ``NoWorkers`` where nobody is left, ``NoPlan`` or ``DoesNotFit`` where those who are cannot do it."""
    usable = {m.facts.name: m.facts for m in members if not m.problem and not m.facts.draining}
    fit = {name: facts for name, facts in usable.items() if name not in without}
    if not fit:
        raise NoWorkers("no worker is left")
    same = _same_cut(epoch, plan, shape, order, fit)
    return same or _new_cut(epoch, plan, shape, order, fit)


def restore_plan(
    number: Callable[[], int],
    first: Assignment,
    plan: Plan,
    shape: ModelShape,
    order: LoadOrder,
    steady: Iterable[WorkerInfo],
) -> Assignment | None:
    """The first plan again, once all its workers are among the steady ones; None before, and where it is in place.

    ``number`` gives the number of its epoch.
    """
    if _cut(first.plan) == _cut(plan):
        return None
    there = {f.name: f for f in steady if not f.draining}
    if not all(w.name in there for w in first.workers):
        return None
    return _laid(number(), shape, order, [there[w.name] for w in first.workers], [s.layers for s in first.plan.stages])


def _cut(plan: Plan) -> list[tuple[str, LayerRange]]:
    return [(s.worker, s.layers) for s in plan.stages]


def holds(facts: WorkerInfo, stage: PlannedStage) -> bool:
    """Whether the worker has the stage's weights in memory, of whatever epoch."""
    spec = stage.spec
    held = facts.fingerprint, facts.layers, facts.kv_bits
    return bool(facts.epoch) and held == (spec.model.fingerprint, spec.layers, spec.kv_bits)


def adoptable_plan(
    shape: ModelShape, order: LoadOrder, members: Iterable[WorkerInfo]
) -> tuple[tuple[WorkerInfo, ...], LoadOrder] | None:
    """Workers and order such that slices which are held already stay where they are; None where they are not whole.

    A coordinator that was started again finds its workers still holding the model, and adopts them so.
    """
    mine = [f for f in members if f.epoch and f.fingerprint == shape.model.fingerprint and f.kv_bits == order.kv_bits]
    newest = max((f.epoch for f in mine), default=0)
    holders = sorted((f for f in mine if f.epoch == newest and f.layers), key=lambda f: f.layers or _NO_LAYERS)
    ranges = tuple(f.layers for f in holders if f.layers)
    ends = [0, *(r.end for r in ranges)]
    whole = bool(ranges) and ends[-1] == shape.layers and [r.start for r in ranges] == ends[:-1]
    as_asked = order.layers in (None, ranges) and order.workers in (None, len(ranges))
    if not (whole and as_asked) or any(f.draining for f in holders):
        return None
    return tuple(holders), replace(order, layers=ranges, workers=len(ranges))


_NO_LAYERS = LayerRange(0, 1)


def _same_cut(
    epoch: int, plan: Plan, shape: ModelShape, order: LoadOrder, fit: dict[str, WorkerInfo]
) -> Assignment | None:
    """The same ranges, a spare in the place of each worker that is not there; None where there are too few."""
    spares = [facts for name, facts in fit.items() if name not in {s.worker for s in plan.stages}]
    workers: list[WorkerInfo] = []
    for stage in plan.stages:
        chosen = fit.get(stage.worker) or _best(stage, spares)
        if chosen is None:
            return None
        if chosen in spares:
            spares.remove(chosen)
        workers.append(chosen)
    try:
        return _laid(epoch, shape, order, workers, [s.layers for s in plan.stages])
    except DoesNotFit:
        return None


def _best(stage: PlannedStage, spares: Sequence[WorkerInfo]) -> WorkerInfo | None:
    """The spare that has the layers already, else the largest."""
    return max(spares, key=lambda f: (holds(f, stage), f.memory_limit), default=None)


def _new_cut(epoch: int, plan: Plan, shape: ModelShape, order: LoadOrder, fit: dict[str, WorkerInfo]) -> Assignment:
    """Those who are left in the order of the plan, then spares, as many as the model has pieces for.

    Where that does not fit, since a worker is too small for any piece, the smallest is left out. Raises ``DoesNotFit``.
    """
    before = [s.worker for s in plan.stages]
    ordered = sorted(fit.values(), key=lambda f: (before.index(f.name) if f.name in before else len(before), f.name))
    refusal: DoesNotFit | None = None
    while True:
        try:
            return _laid(epoch, shape, order, ordered[: len(shape.clean_cuts) + 1], None)
        except DoesNotFit as e:
            refusal = refusal or e  # its figures are those of all workers
            if len(ordered) == 1:
                raise refusal from None
            ordered.remove(min(ordered, key=lambda f: f.memory_limit))


def _laid(
    epoch: int, shape: ModelShape, order: LoadOrder, workers: Sequence[WorkerInfo], layers: list[LayerRange] | None
) -> Assignment:
    asked = replace(order, layers=tuple(layers) if layers else None, workers=len(workers))
    return Assignment(make_plan(epoch, shape, workers, asked), tuple(workers))
