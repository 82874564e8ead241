"""What stand-ins for the coordinator have in common: neither a plan, nor workers, nor a journal."""

from __future__ import annotations

from cluster.coordinator.request_timings import ClusterTotals


class WorkerlessCoordinator:
    """The part of a coordinator that health, metrics and status read."""

    activity = ""
    journal = None
    totals = ClusterTotals()

    async def plan_and_view(self) -> tuple[None, None]:
        return None, None

    def known_workers(self) -> tuple[()]:
        return ()
