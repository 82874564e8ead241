"""From a model's shape and the workers that are there to a plan, and what it can take. Decides; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cluster.coordinator.settings import LoadOrder
from cluster.errors import InvalidOption, NoPlan
from cluster.limits import LANE_ROWS, MAX_STAGES, PREFIX_SHARE
from cluster.placement.solve import Room, check, solve
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.memory import Cost
from cluster.types import LayerRange, ModelShape, Plan, PlannedStage, StageSpec, WorkerFacts


def lay_out(epoch: int, shape: ModelShape, workers: Sequence[WorkerFacts], order: LoadOrder) -> Plan:
    """The plan for these workers, in their order. Raises ``NoPlan``, ``DoesNotFit`` or ``InvalidOption``."""
    layers = order.layers
    if layers and len(layers) != len(workers):
        raise NoPlan(f"{len(layers)} layer ranges were given for {len(workers)} workers; give one range for each")
    if order.lanes is not None and not 1 <= order.lanes <= MAX_STAGES:
        raise InvalidOption(f"--lanes is {order.lanes}; it must be from 1 to {MAX_STAGES}", field="lanes")
    rooms = [Room(w.name, w.memory_limit) for w in workers]
    ranges = _ranges(shape, rooms, layers)
    stages = tuple(
        PlannedStage(
            StageSpec(epoch, i, len(ranges), shape.model, ranges[i], shape.max_context, order.kv_bits),
            room.worker,
            used,
            room.usable - used,
        )
        for i, (room, used) in enumerate(zip(rooms, map(shape.stage_bytes, ranges), strict=True))
    )
    lanes, rows = order.lanes or len(stages), LANE_ROWS if shape.batchable else 1
    full = min(s.cache_bytes // max(shape.stage_cache_bytes(s.layers), 1) for s in stages)
    return Plan(epoch, shape.model, stages, order.route, shape.max_context, min(full, lanes * rows), lanes, rows)


def _ranges(shape: ModelShape, rooms: Sequence[Room], layers: Sequence[LayerRange] | None) -> tuple[LayerRange, ...]:
    if layers is None:
        return solve(shape, rooms, 1)
    check(shape, rooms, layers, 1)
    return tuple(layers)


def capacity(plan: Plan, shape: ModelShape, max_step_ms: float) -> Capacity:
    """What the scheduler may put on the plan's stages."""
    layers = [s.layers for s in plan.stages]

    @lru_cache(maxsize=4096)
    def cost_of(tokens: int) -> Cost:
        return tuple(shape.stage_cache_bytes(own, tokens) for own in layers)

    budget = tuple(s.cache_bytes for s in plan.stages)
    return Capacity(
        lanes=plan.lanes,
        rows=plan.rows,
        window=len(plan.stages) + 1,
        budget=budget,
        prefix_budget=tuple(int(b * PREFIX_SHARE) for b in budget),
        cost_of=cost_of,
        trimmable=shape.trimmable,
        max_step_ms=max_step_ms,
    )
