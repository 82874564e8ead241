"""Move layers to other workers as planned, while requests go on: a worker drains, or takes its own layers back."""

from __future__ import annotations

from collections.abc import Collection

from cluster.coordinator.epoch import Epoch
from cluster.coordinator.recovery import EpochChange, RecoveryContext
from cluster.coordinator.replan import Assignment, holds


class PlannedMove(EpochChange):
    """One move of layers to another epoch, for the sentence ``reason``. Nothing is lost, so requests need not wait."""

    def __init__(
        self, context: RecoveryContext, epoch: Epoch, reason: str, worker: str = "", without: Collection[str] = ()
    ) -> None:
        super().__init__(context, epoch, without)
        self._reason, self._worker = reason, worker
        self.switched = False
        """Whether the move has closed the old ring, or has seen it break."""

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def worker(self) -> str:
        return self._worker

    async def run(self, chosen: Assignment | None = None) -> Epoch:
        """Open the next epoch while the old ring still runs. Slices load first, so requests wait only for the switch.

        Raises ``NoPlan`` or ``NoWorkers`` if the layers cannot be moved, and the errors of a load. If the old ring
        breaks during the load, raises that loss, since requests must not wait for a planned load. After an error,
        nothing has changed unless ``switched``.
        """
        chosen = chosen or self._choose_assignment(self._context.deps.members())
        newcomers = {w.name for w in chosen.workers} - {w.name for w in self._epoch.workers}
        if chosen.plan.is_grouped:  # its ranks load at the same time, those of the old ring too
            newcomers = set()
        pairs = zip(chosen.plan.stages, chosen.workers, strict=True)
        self._missing_bytes = sum(s.weight_bytes for s, w in pairs if not holds(w, s))
        receivers = ", ".join(sorted(newcomers)) or ("the remaining workers" if self._missing_bytes else "")
        self.doing = f"moving layers to {receivers}" if receivers else "linking the stages again"
        self._context.deps.roster.pin((*self._epoch.workers, *chosen.workers))
        self._context.deps.roster.claim_all(chosen.plan, chosen.workers)
        try:
            load = self._context.builder.load(chosen.plan, chosen.workers, only=newcomers)
            await self._while_all_live(chosen, load, self._require_old_ring)
        except BaseException:
            self._context.deps.roster.pin(self._epoch.workers)
            self._context.deps.roster.claim_all(self._epoch.plan, self._epoch.workers)
            raise
        self.switched = True
        self._context.loop.hold()
        return await self._open(chosen)

    def _require_old_ring(self) -> None:
        if not self._context.failures.empty():
            self.switched = True
            raise self._context.failures.get_nowait()
