"""From a model's shape and the workers that are there to a plan. Decides; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import DoesNotFit, NoPlan
from cluster.placement.solve import Room, check, solve
from cluster.types import LayerRange, ModelShape, Plan, PlannedStage, Route, StageSpec, WorkerFacts


def lay_out(
    epoch: int,
    shape: ModelShape,
    workers: Sequence[WorkerFacts],
    layers: Sequence[LayerRange] | None,
    route: Route,
) -> Plan:
    """The plan for these workers, in their order. Raises ``NoPlan`` or ``DoesNotFit``.

    As many sequences are promised as there are stages, fewer where memory allows no more.
    """
    if layers and len(layers) != len(workers):
        raise NoPlan(f"{len(layers)} layer ranges were given for {len(workers)} workers; give one range for each")
    rooms = [Room(w.name, w.memory_limit) for w in workers]
    for sequences in range(len(workers), 0, -1):
        try:
            ranges = _ranges(shape, rooms, layers, sequences)
        except DoesNotFit:
            if sequences == 1:
                raise
        else:
            return _plan(epoch, shape, workers, ranges, route, sequences)
    raise NoPlan("there is no worker to plan for")


def _ranges(
    shape: ModelShape, rooms: Sequence[Room], layers: Sequence[LayerRange] | None, sequences: int
) -> tuple[LayerRange, ...]:
    if layers is None:
        return solve(shape, rooms, sequences)
    check(shape, rooms, layers, sequences)
    return tuple(layers)


def _plan(
    epoch: int,
    shape: ModelShape,
    workers: Sequence[WorkerFacts],
    ranges: Sequence[LayerRange],
    route: Route,
    sequences: int,
) -> Plan:
    stages = tuple(
        PlannedStage(
            StageSpec(epoch, i, len(ranges), shape.model, layers, shape.max_context),
            worker.name,
            shape.stage_bytes(layers),
            sequences * shape.stage_cache_bytes(layers),
        )
        for i, (worker, layers) in enumerate(zip(workers, ranges, strict=True))
    )
    return Plan(epoch, shape.model, stages, route, shape.max_context, sequences)
