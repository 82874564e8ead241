"""Adopt the slices that workers still hold from before the coordinator restarted, so that nothing is loaded again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import anyio

from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder
from cluster.core.limits import ADOPTION_LOOKS, SETTLE_S
from cluster.core.plan import LayerRange, ModelShape
from cluster.core.worker import WorkerInfo

_NO_LAYERS = LayerRange(0, 1)


async def adopt_held_slices(
    shape: ModelShape, order: LoadOrder, workers: tuple[WorkerInfo, ...], roster: RosterView
) -> tuple[tuple[WorkerInfo, ...], LoadOrder]:
    """Return the workers and the order that keep all held slices where they are.

    Look ``ADOPTION_LOOKS`` times while one holds a slice from before, since not every worker may have answered yet.
    Without a complete set of slices, return ``workers`` and ``order`` unchanged.
    """
    for _ in range(ADOPTION_LOOKS):
        members = [m.info for m in roster.members if not m.problem]
        adopted = adoptable_plan(shape, order, members)
        if adopted or not any(roster.holds_from_before(f) for f in members):
            return adopted or (workers, order)
        await anyio.sleep(SETTLE_S)
        await roster.refresh()
    return workers, order


def adoptable_plan(
    shape: ModelShape, order: LoadOrder, members: Iterable[WorkerInfo]
) -> tuple[tuple[WorkerInfo, ...], LoadOrder] | None:
    """Return workers and an order that keep all held slices where they are; None if these do not form a whole model."""
    matching = [
        f
        for f in members
        if f.epoch
        and (f.fingerprint, f.kv_bits, f.weight_bits) == (shape.model.fingerprint, order.kv_bits, order.quantize)
    ]
    newest = max((f.epoch for f in matching), default=0)
    of_newest = (f for f in matching if f.epoch == newest and f.layers)
    slice_workers = sorted(of_newest, key=lambda f: f.layers or _NO_LAYERS)
    ranges = tuple(f.layers for f in slice_workers if f.layers)
    ends = [0, *(r.end for r in ranges)]
    whole = bool(ranges) and ends[-1] == shape.layers and [r.start for r in ranges] == ends[:-1]
    as_asked = order.layers in (None, ranges) and order.worker_count in (None, len(ranges))
    if not (whole and as_asked) or any(f.draining for f in slice_workers):
        return None
    return tuple(slice_workers), replace(order, layers=ranges, worker_count=len(ranges))
