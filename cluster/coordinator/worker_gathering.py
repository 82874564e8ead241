"""Gather the workers for a load: those that an order asks for, or those that are left of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import PurePath

from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import NoWorkers
from cluster.core.limits import RETURN_S, SETTLE_S
from cluster.core.plan import ModelShape
from cluster.core.worker import WorkerInfo
from cluster.placement.memory_split import WorkerMemory, check_cuts, is_too_small, require_pieces

__all__ = ["gather_remaining", "gather_workers", "require_cuts"]

log = logging.getLogger(__name__)


async def gather_workers(
    roster: RosterView, order: LoadOrder, shape: ModelShape, report: LoadReporter
) -> tuple[WorkerInfo, ...]:
    """Wait for the workers that the order asks for, and for one more if there is a draft model.

    One that is too small for any piece of the model does not count. Raises ``NoPlan`` at once if the model cannot be
    cut so, and the errors of ``Roster.gather``.
    """
    require_cuts(shape, order)
    wanted, purpose = order.wanted_workers, ""
    if wanted and order.draft:
        purpose = f"{wanted} for the model and 1 for the draft model {PurePath(order.draft).name}"
        wanted += 1
    return await roster.gather(
        wanted,
        order.wait_s,
        report,
        lambda w: _counts(w, shape, order),
        purpose,
    )


def _counts(worker: WorkerInfo, shape: ModelShape, order: LoadOrder) -> bool:
    """Return whether a worker is one of those that the order asks for: named in a group, or large enough."""
    if any(worker.name in group for group in order.groups):
        return True
    needs_others = not order.groups or (order.stage_count or 0) > len(order.groups)
    return needs_others and not is_too_small(shape, WorkerMemory(worker.name, worker.memory_limit))


def require_cuts(shape: ModelShape, order: LoadOrder) -> None:
    """Raise ``NoPlan`` if the model cannot be cut as the order asks, on whatever workers."""
    if order.layers:
        check_cuts(shape, order.layers)
    require_pieces(shape, order.stage_count or 1)


async def gather_remaining(
    roster: RosterView, order: LoadOrder, shape: ModelShape, report: LoadReporter
) -> tuple[tuple[WorkerInfo, ...], LoadOrder]:
    """Wait for the workers of an order that was served before. Return them, and the order for which they suffice.

    A worker that is gone is waited for ``RETURN_S``, as in a recovery; by a leader that was elected ``SETTLE_S``, since
    all workers were asked just before. Then the order no longer asks for a number of workers or for layers. Raises the
    errors of ``gather_workers``.
    """
    hurried = replace(order, wait_s=min(order.wait_s, SETTLE_S if roster.was_elected else RETURN_S))
    try:
        return await gather_workers(roster, hurried, shape, report), order
    except NoWorkers as missing:
        if order.wanted_workers is None:
            raise
        log.warning("load: using the workers that are left reason=%s", missing.sentence)
    order = replace(order, worker_count=None, layers=None, groups=())
    return await gather_workers(roster, order, shape, report), order
