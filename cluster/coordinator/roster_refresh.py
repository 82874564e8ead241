"""Refresh the roster while no heartbeat does."""

from __future__ import annotations

import asyncio

from cluster.coordinator.roster import Roster, RosterEntry
from cluster.core.limits import STATUS_ASK_S, UNLOAD_TIMEOUT_S


class RosterRefresh:
    """Asks the workers of a roster. Concurrent callers share one refresh, which goes on after a caller's time-out."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._task: asyncio.Task[tuple[RosterEntry, ...]] | None = None

    async def members(self) -> tuple[RosterEntry, ...]:
        """Refresh the roster and return its members; after ``STATUS_ASK_S``, return the last known members."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._roster.refresh())
        done, _ = await asyncio.wait((self._task,), timeout=STATUS_ASK_S)
        return next(iter(done)).result() if done else self._roster.members

    async def close(self) -> None:
        """Cancel a refresh that is running."""
        if self._task:
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=UNLOAD_TIMEOUT_S)
