"""Decide the next epoch's plan after the loss of a stage. Loads nothing.

Preference, in this order: the same workers, if all are back; a spare for each missing worker, the draft model's last; a
new cut over the remaining workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from cluster.coordinator.planner import make_plan
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit, InsecureGroup, NoPlan, NoWorkers
from cluster.core.plan import LayerRange, ModelShape, Plan, PlannedStage
from cluster.core.worker import WorkerInfo
from cluster.placement.memory_split import place_on_largest


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
    last: Collection[str] = (),
) -> Assignment:
    """Return the plan of the next epoch over the usable members, except those named in ``without``.

    Those named in ``last`` take the place of a missing worker only if no other spare can. They are part of a new cut
    only if the model does not fit otherwise.

    Raises ``NoWorkers`` if no worker is left, and ``NoPlan`` or ``DoesNotFit`` if the model does not fit on the rest.
    """
    usable = {m.info.name: m.info for m in members if not m.problem and not m.info.draining}
    fit = {name: info for name, info in usable.items() if name not in without}
    if not fit:
        raise NoWorkers("no worker is left to hold the layers; start one with `macpipe worker`")
    others = {name: info for name, info in fit.items() if name not in last or name in {s.worker for s in plan.stages}}
    choices = [others, fit] if len(others) < len(fit) else [fit]
    for offered in choices:
        if same := _keep_cut(epoch, plan, shape, order, offered):
            return same
    if len(choices) > 1 and others:
        with suppress(NoPlan, DoesNotFit):
            return _make_new_cut(epoch, plan, shape, order, others)
    return _make_new_cut(epoch, plan, shape, order, fit)


def restore_plan(
    number: Callable[[], int],
    first: Assignment,
    plan: Plan,
    shape: ModelShape,
    order: LoadOrder,
    steady: Iterable[WorkerInfo],
) -> Assignment | None:
    """Return the first plan under a new epoch, if all its workers are among ``steady``.

    Return None if some are missing, or if ``plan`` already has the first plan's workers and layers. ``number`` returns
    the epoch number.
    """
    if _cut_of(first.plan) == _cut_of(plan):
        return None
    available = {f.name: f for f in steady if not f.draining}
    if not all(w.name in available for w in first.workers):
        return None
    found = _assign(
        number(),
        shape,
        replace(order, groups=_groups_of(first.plan, first.workers)),
        [available[w.name] for w in first.workers],
        [s.layers for s in first.plan.pipeline],
    )
    return replace(found, plan=_keep_prediction(first.plan, found.plan))


def _keep_prediction(before: Plan, plan: Plan) -> Plan:
    """Return the plan with the predicted times of the one before, if that had the same groups on the same workers.

    A recovery measures no links, so it would count the sums of a group as those over an ordinary link.
    """
    if not plan.is_grouped or _cut_of(before) != _cut_of(plan):
        return plan
    pairs = zip(plan.stages, before.stages, strict=True)
    stages = tuple(replace(stage, decode_ms=same.decode_ms) for stage, same in pairs)
    return replace(plan, stages=stages, forecast=before.forecast)


def _cut_of(plan: Plan) -> list[tuple[str, LayerRange, int]]:
    return [(s.worker, s.layers, s.spec.ranks) for s in plan.stages]


def _groups_of(plan: Plan, workers: Sequence[WorkerInfo]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the workers of each group of a plan, whose seats these workers take."""
    ranks: dict[int, list[str]] = {}
    for stage, worker in zip(plan.stages, workers, strict=True):
        if stage.spec.ranks > 1:
            ranks.setdefault(stage.spec.index, []).append(worker.name)
    return tuple(map(tuple, ranks.values()))


def holds(info: WorkerInfo, stage: PlannedStage) -> bool:
    """Return whether the worker has the stage's weights in memory, from any epoch.

    A rank of a group never counts: MLX's groups are for the life of a process, so each epoch has new ones.
    """
    return bool(info.epoch) and stage.spec.ranks == 1 and info.load_key == stage.spec.load_key


def _keep_cut(
    epoch: int, plan: Plan, shape: ModelShape, order: LoadOrder, fit: dict[str, WorkerInfo]
) -> Assignment | None:
    """Return the same layer ranges with a spare for each missing worker; None if the spares do not suffice."""
    spares = [info for name, info in fit.items() if name not in {s.worker for s in plan.stages}]
    workers: list[WorkerInfo] = []
    for stage in plan.stages:
        chosen = fit.get(stage.worker) or _best_spare(stage, spares)
        if chosen is None:
            return None
        if chosen in spares:
            spares.remove(chosen)
        workers.append(chosen)
    try:
        seated = replace(order, groups=_groups_of(plan, workers))
        found = _assign(epoch, shape, seated, workers, [s.layers for s in plan.pipeline])
    except (DoesNotFit, InsecureGroup):
        return None
    return replace(found, plan=_keep_prediction(plan, found.plan))


def _best_spare(stage: PlannedStage, spares: Sequence[WorkerInfo]) -> WorkerInfo | None:
    """Return the spare that already holds the layers, else the one with the largest memory limit."""
    return max(spares, key=lambda f: (holds(f, stage), f.memory_limit), default=None)


def _make_new_cut(
    epoch: int, plan: Plan, shape: ModelShape, order: LoadOrder, fit: dict[str, WorkerInfo]
) -> Assignment:
    """Return a new cut over the plan's remaining workers in their order, then spares, up to the model's piece count.

    Groups that lack a member are dissolved. Raises ``DoesNotFit`` if the model fits on no such set (see
    ``place_on_largest``).
    """
    before = [s.worker for s in plan.stages]
    ordered = sorted(fit.values(), key=lambda f: (before.index(f.name) if f.name in before else len(before), f.name))
    pieces = len(shape.clean_cuts) + 1

    def assign(workers: Sequence[WorkerInfo]) -> Assignment:
        names = {worker.name for worker in workers}
        whole = replace(order, groups=tuple(group for group in order.groups if names.issuperset(group)))
        together = sum(len(group) - 1 for group in whole.groups)
        return _assign(epoch, shape, whole, workers[: pieces + together], None)

    return place_on_largest(ordered, lambda f: f.memory_limit, assign)


def _assign(
    epoch: int, shape: ModelShape, order: LoadOrder, workers: Sequence[WorkerInfo], layers: list[LayerRange] | None
) -> Assignment:
    count = len(workers) - sum(len(group) - 1 for group in order.groups)
    narrowed = replace(order, layers=tuple(layers) if layers else None, worker_count=count)
    plan = make_plan(epoch, shape, workers, narrowed)
    by_name = {w.name: w for w in workers}  # the planner may put the workers in another order
    return Assignment(plan, tuple(by_name[stage.worker] for stage in plan.stages))
