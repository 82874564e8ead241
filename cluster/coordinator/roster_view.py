"""The roster as one holder of stages sees it: what it pins does not replace what others pin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.worker import WorkerInfo


class RosterView:
    """The workers of a cluster, for the holder with this name."""

    def __init__(self, roster: Roster, holder: str) -> None:
        self._roster, self._holder = roster, holder

    @property
    def members(self) -> tuple[RosterEntry, ...]:
        """The members as they answered last."""
        return self._roster.members

    async def refresh(self) -> tuple[RosterEntry, ...]:
        """Ask all workers to describe themselves. Return the members, sorted by name."""
        return await self._roster.refresh()

    def holds_from_before(self, info: WorkerInfo) -> bool:
        """Return whether the worker's slice is from a predecessor with the same id, see ``Roster``."""
        return self._roster.holds_from_before(info)

    async def gather(
        self, wanted: int | None, wait_s: float, report: LoadReporter, counts: Callable[[WorkerInfo], bool]
    ) -> tuple[WorkerInfo, ...]:
        """Wait for usable workers, see ``Roster.gather``."""
        return await self._roster.gather(wanted, wait_s, report, counts)

    async def present(self, wanted: int | None) -> tuple[WorkerInfo, ...]:
        """Return the usable workers present now, see ``Roster.present``."""
        return await self._roster.present(wanted)

    def control(self, address: str) -> WorkerClient:
        """Return the client of the worker at an address."""
        return self._roster.control(address)

    def pin(self, workers: Sequence[WorkerInfo]) -> None:
        """Keep asking the workers that hold a stage. Replaces the holder's previous set."""
        self._roster.pin(self._holder, workers)

    def pin_draft(self, worker: WorkerInfo | None) -> None:
        """Keep asking the worker that holds the draft model, too; None if there is none."""
        self._roster.pin(f"draft of {self._holder}", [worker] if worker else [])
