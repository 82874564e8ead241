"""Plan a model beside others: those that are loaded, and those that are yet to be loaded on the same workers.

What is loaded stays where it is. The model avoids its Macs where it can, and its caches leave room for what is yet to
come, and for a stage of another model whose Mac is lost. If it does not fit beside all that, it is planned as if
nothing was to come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.coordinator.joint_planner import ModelToPlace, create_demand
from cluster.coordinator.planner import (
    Links,
    build_plan,
    explain_exposure,
    full_contexts,
    leave_room,
    limit_caches,
    make_plan,
    offer_workers,
)
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.plan import ModelShape, Plan, PlannedStage
from cluster.core.worker import WorkerInfo
from cluster.placement.arrangement import LoadedModel, ModelPlace
from cluster.placement.candidates import Sums
from cluster.placement.explain_several import explain_model, explain_place
from cluster.placement.memory_split import needed_bytes
from cluster.placement.several_models import JointPlacement, place_models

__all__ = ["Neighbours", "describe_loaded", "plan_beside"]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The models beside the one with this own name. ``loaded`` are those that hold slices.

    ``waiting`` are those of the catalog that do not, this one included, in the catalog's order.
    """

    name: str
    loaded: tuple[LoadedModel, ...] = ()
    waiting: tuple[ModelEntry, ...] = ()

    @property
    def coming(self) -> tuple[ModelEntry, ...]:
        """The models that are yet to be loaded, without this one."""
        return tuple(entry for entry in self.waiting if entry.name != self.name)

    def without(self, names: Collection[str]) -> Neighbours:
        """Return the neighbours without those coming models that have their memory already."""
        kept = (entry for entry in self.waiting if entry.name == self.name or entry.name not in names)
        return replace(self, waiting=tuple(kept))


def describe_loaded(name: str, plans: Collection[Plan], shape: ModelShape | None = None) -> LoadedModel:
    """Describe a model that serves with these plans, one for each replica.

    It takes no bytes here: the workers' memory is what such models leave of it. What its stages need is only known with
    its ``shape``.
    """
    shares: dict[str, float] = {}
    for plan in plans:
        known = all(stage.decode_ms for stage in plan.stages)
        parts = {stage.worker: stage.decode_ms if known else len(stage.layers) for stage in plan.stages}
        whole = sum(parts[stage.worker] for stage in plan.pipeline)
        shares |= {worker: part / whole for worker, part in parts.items()}
    held = {(stage.layers, stage.spec.ranks) for plan in plans for stage in plan.stages} if shape else ()
    needs = (needed_bytes(shape, own, 1, ranks) for own, ranks in held if shape)
    return LoadedModel(name, {}, shares, stage_bytes=max(needs, default=0))


def plan_beside(
    number: int,
    shape: ModelShape,
    workers: Sequence[WorkerInfo],
    order: LoadOrder,
    links: Links,
    everyone: Sequence[WorkerInfo],
    neighbours: Neighbours,
    shapes: Mapping[str, ModelShape],
    sums: Sums | None = None,
) -> tuple[Plan, LoadOrder]:
    """Return a plan over some of these workers, with the memory that others leave, and the order that keeps to it.

    The coming models may use ``everyone``. ``shapes`` are theirs by name; of one that it lacks, it is only known that
    it comes. Raises the errors of ``make_plan``.
    """
    unknown = sum(entry.name not in shapes for entry in neighbours.coming)
    if not neighbours.loaded and not shapes:
        return leave_room(make_plan(number, shape, workers, order, links, sums), shape, order, unknown)
    models = _rank(shape, order, neighbours, shapes)
    demands = [
        create_demand(
            one,
            offer_workers(
                one.shape,
                workers if one.name == neighbours.name else everyone,
                # whether a coming model may use insecure links is decided when it is loaded
                one.order if one.name == neighbours.name else replace(one.order, groups=()),
                links,
                sums,
            ),
        )
        for one in models
    ]
    placement = place_models(demands, neighbours.loaded)
    place = placement.find(neighbours.name)
    if place is None:
        return leave_room(make_plan(number, shape, workers, order, links, sums), shape, order, unknown)
    proposal, shares = explain_place(placement, place), placement.shares[place.name]
    plan = explain_exposure(build_plan(number, shape, proposal, order, shares), workers)
    plan = replace(plan, reasons=(*explain_model(placement, place), *plan.reasons))
    whole = {w.name: w.memory.usable for w in place.demand.candidates.workers}
    if order.cached_contexts is None:
        movable = _list_movable(placement, place)
        limits = [most for stage in plan.stages if (most := _count_contexts(stage, shape, movable))]
        is_shared = any(nbytes < whole[name] for name, nbytes in shares.items())
        if is_shared or limits:
            contexts = min([*limits, full_contexts(plan.stages, shape)])
            plan, order = limit_caches(plan, shape, contexts), replace(order, cached_contexts=contexts)
    return leave_room(plan, shape, order, unknown)


def _list_movable(placement: JointPlacement, own: ModelPlace) -> list[tuple[Collection[str], int]]:
    """Return the Macs of each model but ``own``, with the bytes that another Mac needs if it takes one's stage."""
    found: list[tuple[Collection[str], int]] = [(one.step_shares.keys(), one.stage_bytes) for one in placement.loaded]
    found += [(one.macs, max(need.least for need in one.needs.values())) for one in placement.placed if one is not own]
    return found


def _count_contexts(stage: PlannedStage, shape: ModelShape, others: Iterable[tuple[Collection[str], int]]) -> int:
    """Return how many full contexts a stage's caches may hold, so that its Mac has room for a stage of any model.

    A Mac that is lost leaves its stages to the others. Return 0 if the stage keeps all: there are no others, or no such
    room beside one full context.
    """
    most = max((nbytes for macs, nbytes in others if stage.worker not in macs), default=0)
    context_bytes = shape.of_rank(stage.spec.ranks).stage_cache_bytes(stage.layers)
    return max(stage.cache_bytes - most, 0) // max(context_bytes, 1) if most else 0


def _rank(
    shape: ModelShape, order: LoadOrder, neighbours: Neighbours, shapes: Mapping[str, ModelShape]
) -> list[ModelToPlace]:
    """Return the model and those to come: first those that must have room, each kind by priority and catalog.

    The model itself must have it, since it is loaded now.
    """
    models = [
        ModelToPlace(entry.name, order, shape, True, entry.priority)
        if entry.name == neighbours.name
        else ModelToPlace.of(entry, shapes[entry.name])
        for entry in neighbours.waiting
        if entry.name in {neighbours.name, *shapes}
    ]
    ranked = sorted(models, key=lambda one: (not one.pinned, -one.priority))
    return [replace(one, priority=-i) for i, one in enumerate(ranked)]
