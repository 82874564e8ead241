"""Have the workers of this leader's rings store which copies of its journal are in sync.

A worker is told before it is loaded, and all of them before the leader goes on without one of the copies. So no worker
of a ring names a copy that lacks something that left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.membership.in_sync import InSyncSet
from cluster.membership.terms import Process

__all__ = ["InSyncNames", "NamingWorker"]


class NamingWorker(Protocol):
    """A worker's client, as far as copies are concerned."""

    async def name_in_sync(self, process: Process, in_sync: InSyncSet) -> None:
        """Have a set stored. Raises the worker's error."""


class InSyncNames:
    """The set that the workers store. ``replicas`` are the ids of the copies at first.

    ``term`` returns the number of the leader's term, ``ring`` the workers that hold or load its slices.
    """

    def __init__(
        self,
        process: Process,
        replicas: Sequence[str],
        term: Callable[[], int],
        ring: Callable[[], Sequence[NamingWorker]],
    ) -> None:
        self._process, self._term, self._ring = process, term, ring
        self._replicas, self._version = tuple(replicas), 1
        self._storing = asyncio.Lock()

    async def join(self, workers: Sequence[NamingWorker]) -> None:
        """Have the present set stored at workers of a ring that is about to be loaded. Raises the first error."""
        async with self._storing:
            await self._store(workers)

    async def name(self, replicas: Sequence[str]) -> None:
        """Have another set stored at the workers of all rings. Raises the first error; then some may have it."""
        async with self._storing:
            self._replicas = tuple(replicas)
            self._version += 1
            await self._store(self._ring())

    async def _store(self, workers: Sequence[NamingWorker]) -> None:
        in_sync = InSyncSet(self._term(), self._version, self._replicas)
        found = await asyncio.gather(
            *(worker.name_in_sync(self._process, in_sync) for worker in workers), return_exceptions=True
        )
        for error in found:
            if isinstance(error, BaseException):
                raise error
