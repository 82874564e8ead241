"""Adopt the slices that workers still hold from before the coordinator restarted, so that nothing is loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import anyio

from cluster.coordinator.roster import Roster
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.slice_claims import SliceClaim, SliceClaims
from cluster.core.limits import ADOPTION_LOOKS, SETTLE_S
from cluster.core.plan import LayerRange, ModelShape
from cluster.core.worker import HeldSlice, WorkerInfo

_NO_LAYERS = LayerRange(0, 1)


async def adopt_held_slices(
    shape: ModelShape, order: LoadOrder, workers: tuple[WorkerInfo, ...], roster: RosterView
) -> tuple[tuple[WorkerInfo, ...], LoadOrder]:
    """Return the workers and the order that keep all held slices where they are.

    Look ``ADOPTION_LOOKS`` times while one holds a slice of this model from before, since not every worker may have
    answered yet. In an election all have, so a leader that was elected waits for none that did not.
    Without a complete set of slices, return ``workers`` and ``order`` unchanged.
    """
    for _ in range(ADOPTION_LOOKS):
        held = roster.held_slices
        adopted = adoptable_plan(shape, order, held)
        if adopted:
            return adopted
        from_before = any(_is_slice_of(shape, order, f) and roster.holds_from_before(f) for f in held)
        if not from_before or roster.has_all_heard:
            break
        await anyio.sleep(SETTLE_S)
        await roster.refresh()
    return workers, order


def adoptable_plan(
    shape: ModelShape, order: LoadOrder, members: Iterable[WorkerInfo]
) -> tuple[tuple[WorkerInfo, ...], LoadOrder] | None:
    """Return workers and an order that keep all held slices where they are; None if these do not form a whole model."""
    matching = [f for f in members if _is_slice_of(shape, order, f)]
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


def _is_slice_of(shape: ModelShape, order: LoadOrder, info: WorkerInfo) -> bool:
    key = shape.model.fingerprint, order.kv_bits, order.quantize
    return (
        bool(info.epoch)
        and info.ranks == 1
        and not order.groups
        and (info.fingerprint, info.kv_bits, info.weight_bits) == key
    )


class InheritedSlices:
    """The slices from before a restart that further models of the catalog will adopt when they are loaded.

    The first load would free them, since it keeps only what somebody has claimed.
    """

    def __init__(self, roster: Roster, claims: SliceClaims) -> None:
        self._roster, self._claims = roster, claims
        self._heirs: set[str] = set()

    @property
    def heirs(self) -> frozenset[str]:
        """The names of the models that are yet to be loaded, and for which slices are kept."""
        return frozenset(self._heirs)

    def keep_for(self, coming: Sequence[ModelEntry]) -> None:
        """Keep the slices of models that are yet to be loaded."""
        for entry in self._roster.members:
            if not entry.problem:
                for held in sorted(entry.info.slices, key=lambda held: -held.epoch):
                    if self._roster.holds_from_before(entry.info, held.epoch):
                        self._keep(entry.info.control_address, held, coming)

    def _keep(self, address: str, held: HeldSlice, coming: Sequence[ModelEntry]) -> None:
        key = held.model, held.kv_bits, held.weight_bits
        if held.ranks > 1:
            return  # its group cannot be joined again
        heirs = (e.name for e in coming if (e.order.model, e.order.kv_bits, e.order.quantize) == key)
        claim = SliceClaim(held.epoch, held.memory_limit or held.memory_used)
        if heir := next((name for name in heirs if self._claims.inherit(name, address, claim)), ""):
            self._heirs.add(heir)

    def settle(self, name: str) -> None:
        """Note that a model is loaded: what it holds is its own now."""
        self._heirs.discard(name)

    def give_up(self, coming: Sequence[ModelEntry]) -> bool:
        """Give up what is kept for models that are not loaded. Return whether there was anything."""
        heirs = self._heirs & {entry.name for entry in coming}
        for heir in heirs:
            self._claims.release_all_but(heir, ())
        self._heirs -= heirs
        return bool(heirs)
