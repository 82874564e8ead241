"""The roster as one holder of slices sees it: its own slices, and the memory that the slices of others leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.slice_claims import AllClaims, SliceClaim, SliceClaims
from cluster.coordinator.stage_setup import WorkerShare
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import NoWorkers
from cluster.core.plan import Plan, PlannedStage
from cluster.core.text import format_address, parse_address
from cluster.core.worker import HeldSlice, WorkerInfo
from cluster.placement.memory_split import memory_for

_DRAFT: Final = "draft of "
"""Begins the name under which the worker of a holder's draft model is pinned."""


class RosterView:
    """The workers of a cluster, for the holder with this name.

    ``avoids`` tells by the names of other holders whether workers are hidden that hold something of theirs, and nothing
    of this one.
    """

    def __init__(
        self,
        roster: Roster,
        holder: str,
        claims: SliceClaims | None = None,
        avoids: Callable[[str], bool] = lambda holder: False,
    ) -> None:
        self._roster, self._holder, self._claims = roster, holder, claims or SliceClaims()
        self._avoids = avoids
        self._pinned = self._pinned_draft = frozenset[str]()

    @property
    def members(self) -> tuple[RosterEntry, ...]:
        """The members as they answered last."""
        return self.focus_entries(self._roster.members)

    async def refresh(self) -> tuple[RosterEntry, ...]:
        """Ask all workers to describe themselves. Return the members, sorted by name."""
        return self.focus_entries(await self._roster.refresh())

    @property
    def held_slices(self) -> list[WorkerInfo]:
        """The usable members, each once for every slice there that no other holder has claimed."""
        found = list[WorkerInfo]()
        for entry in self._roster.members:
            if not entry.problem:
                own = [self._show(entry.info, held) for held in self._own(entry.info) if not held.problem]
                found += own or [self._focus_info(entry.info)]
        return found

    @property
    def epochs(self) -> list[int]:
        """The epochs of all slices that the members hold."""
        found = [entry.info for entry in self._roster.members]
        return [*(info.epoch for info in found), *(held.epoch for info in found for held in info.slices)]

    @property
    def was_elected(self) -> bool:
        """Whether this process leads in place of another one."""
        return self._roster.was_elected

    @property
    def has_all_heard(self) -> bool:
        """Whether all workers that answered in this process's election are members, see ``Roster``."""
        return self._roster.has_all_heard

    def holds_from_before(self, info: WorkerInfo) -> bool:
        """Return whether the worker's slice is from a predecessor with the same id, see ``Roster``."""
        return self._roster.holds_from_before(info)

    async def gather(
        self,
        wanted: int | None,
        wait_s: float,
        report: LoadReporter,
        counts: Callable[[WorkerInfo], bool],
        purpose: str = "",
    ) -> tuple[WorkerInfo, ...]:
        """Wait for usable workers, see ``Roster.gather``."""
        found = await self._roster.gather(
            wanted, wait_s, report, lambda worker: counts(self._focus_info(worker)), purpose
        )
        return tuple(map(self._focus_info, found))

    async def present(self, wanted: int | None) -> tuple[WorkerInfo, ...]:
        """Return the usable workers present now, see ``Roster.present``. Of those, hidden ones are left out."""
        return tuple(self._focus_info(w) for w in await self._roster.present(wanted) if self.sees(w.control_address))

    def sees(self, address: str) -> bool:
        """Return whether the worker at an address is not hidden."""
        claimed = self._claims.holders(address)
        pinned = {holder.removeprefix(_DRAFT) for holder in self._roster.holders(address)}
        return self._holder in claimed | pinned or not any(map(self._avoids, claimed | pinned))

    async def usable(self, wanted: int | None, wait_s: float, report: LoadReporter) -> tuple[WorkerInfo, ...]:
        """Return the usable workers of now, each with all its memory. Wait for them if too few are there.

        Raises as ``Roster.gather``.
        """
        try:
            return await self._roster.present(wanted)
        except NoWorkers:
            return await self._roster.gather(wanted, wait_s, report)

    def focus_all(self, workers: Sequence[WorkerInfo]) -> tuple[WorkerInfo, ...]:
        """Return workers with the holder's own slices, and without the memory of others."""
        return tuple(map(self._focus_info, workers))

    def without(self, holders: Collection[str]) -> RosterView:
        """Return how the holder sees the workers now if these holders give up what they hold. It does not change."""
        return RosterView(self._roster, self._holder, self._claims.without(holders), self._avoids)

    def control(self, address: str) -> WorkerClient:
        """Return the client of the worker at an address."""
        return self._roster.control(address)

    async def take_term(self, workers: Sequence[WorkerClient]) -> None:
        """Lead all these workers by one term, see ``Roster.take_term``."""
        await self._roster.take_term(workers)

    def pin(self, workers: Sequence[WorkerInfo]) -> None:
        """Keep asking the workers that hold a stage. Replaces the holder's previous set.

        What the holder has claimed on other workers is no longer kept for it.
        """
        self._roster.pin(self._holder, workers)
        self._pinned = frozenset(w.control_address for w in workers)
        self._release_unpinned()

    def pin_draft(self, worker: WorkerInfo | None) -> None:
        """Keep asking the worker that holds the draft model, too; None if there is none."""
        self._roster.pin(_DRAFT + self._holder, [worker] if worker else [])
        self._pinned_draft = frozenset([worker.control_address] if worker else [])
        self._release_unpinned()

    def _release_unpinned(self) -> None:
        self._claims.release_all_but(self._holder, self._pinned | self._pinned_draft)

    def claim(self, address: str, stage: PlannedStage) -> WorkerShare:
        """Claim a worker for a stage. Return what the holder may use of it beside others."""
        nbytes = memory_for(stage.weight_bytes + stage.cache_bytes)
        self._claims.claim(self._holder, address, SliceClaim(stage.spec.epoch, nbytes))
        keep = self._kept(address)
        return WorkerShare(keep, nbytes if keep or self._claims.shared else 0)

    def claim_all(self, plan: Plan, workers: Sequence[WorkerInfo]) -> None:
        """Claim the workers of a plan, in its order, before anything is awaited: then no other plan counts on them."""
        for stage, worker in zip(plan.stages, workers, strict=True):
            self.claim(worker.control_address, stage)

    def is_shared(self, address: str) -> bool:
        """Return whether others have claimed a part of this worker."""
        return bool(self._claims.others(self._holder, address))

    @property
    def others(self) -> AllClaims:
        """What all others have claimed. A plan is outdated once this changes."""
        return self._claims.all_others(self._holder)

    def release(self, address: str, epoch: int) -> tuple[int, ...]:
        """Give up what the holder has claimed on a worker for this epoch or an older one.

        Return the epochs of the slices that others have there.
        """
        self._claims.release(self._holder, address, epoch)
        return self._kept(address)

    def measure_memory(self, workers: Sequence[WorkerInfo]) -> tuple[WorkerInfo, ...]:
        """Return the workers with the memory that others leave of them now."""
        limits = {entry.info.control_address: entry.info.memory_limit for entry in self._roster.members}
        return tuple(
            replace(worker, memory_limit=self._left_of(limits[worker.control_address], worker.control_address))
            if worker.control_address in limits
            else worker
            for worker in workers
        )

    def _left_of(self, limit: int, address: str) -> int:
        return max(limit - sum(other.nbytes for other in self._claims.others(self._holder, address)), 0)

    def _kept(self, address: str) -> tuple[int, ...]:
        return tuple(epoch for other in self._claims.others(self._holder, address) for epoch in other.epochs)

    def focus_entries(self, entries: Iterable[RosterEntry]) -> tuple[RosterEntry, ...]:
        """Return the entries that are not hidden, each as ``focus`` returns it."""
        return tuple(self.focus(entry) for entry in entries if self.sees(entry.info.control_address))

    def focus(self, entry: RosterEntry) -> RosterEntry:
        """Return the entry with the holder's own slice in place of the worker's first, and without others' memory."""
        others = self._claims.others(self._holder, entry.info.control_address)
        if not others:
            return entry
        info = self._focus_info(entry.info)
        own = next((held for held in info.slices if held.epoch == info.epoch), None)
        return replace(entry, info=info, problem=entry.problem or (own.problem if own else ""))

    def _focus_info(self, info: WorkerInfo) -> WorkerInfo:
        if not self._claims.others(self._holder, info.control_address):
            return info
        return self._show(info, max(self._own(info), key=lambda one: one.epoch, default=HeldSlice()))

    def _own(self, info: WorkerInfo) -> list[HeldSlice]:
        """Return the worker's slices that no other holder has claimed."""
        foreign = self._kept(info.control_address)
        return [held for held in info.slices if held.epoch not in foreign]

    def _show(self, info: WorkerInfo, held: HeldSlice) -> WorkerInfo:
        """Return the worker with one of its slices in place of the first, and without others' memory."""
        data_address = info.data_address
        if held.data_port:
            data_address = format_address(parse_address(data_address)[0], held.data_port)
        memory_limit = self._left_of(info.memory_limit, info.control_address)
        return replace(info.showing(held), data_address=data_address, memory_limit=memory_limit)
