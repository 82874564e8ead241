"""Have the workers of this leader's rings store which copies of its journal are in sync.

A worker is told before it is loaded, and all of them before the leader goes on without one of the copies. So no worker
of a ring names a copy that lacks something that left. Spares are told afterwards, so that the loss of a whole ring does
not lose the answers. A spare that was not reached meanwhile may name such a copy: then an answer that goes on from it
has another digest than its client's, or is not found, and ends with that error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from cluster.core.errors import MacpipeError, NotLeader
from cluster.membership.in_sync import InSyncSet
from cluster.membership.terms import Process

__all__ = ["InSyncNames", "NamingWorker"]


class NamingWorker(Protocol):
    """A worker's client, as far as copies are concerned."""

    address: str

    async def name_in_sync(self, process: Process, in_sync: InSyncSet) -> None:
        """Have a set stored. Raises the worker's error."""


class InSyncNames:
    """The set that the workers store. ``replicas`` are the ids of the copies at first.

    ``term`` returns the number of the leader's term, ``ring`` the workers that hold or load its slices. ``earlier``
    returns the set that these workers were told by the leader before; None if this copy is known to lack nothing.
    ``spares`` are the other workers that are led.
    """

    def __init__(
        self,
        process: Process,
        replicas: Sequence[str],
        term: Callable[[], int],
        ring: Callable[[], Sequence[NamingWorker]],
        earlier: Callable[[], InSyncSet] | None = None,
        spares: Callable[[], Sequence[NamingWorker]] = tuple,
    ) -> None:
        self._process, self._term, self._ring = process, term, ring
        self._replicas, self._version = tuple(replicas), 1
        self._earlier = earlier
        self._spares = spares
        self._told: dict[str, InSyncSet] = {}
        """What each present spare has stored, by address."""
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._storing = asyncio.Lock()

    @property
    def is_sure(self) -> bool:
        """Whether this leader's copy lacks nothing. If not, no standby may replace its own copy by this one yet."""
        return self._earlier is None

    async def join(self, workers: Sequence[NamingWorker]) -> None:
        """Have the present set stored at workers of a ring that is about to be loaded.

        Raises ``NotLeader`` if this leader's first workers know that its own copy lacks something, and the first error.
        """
        async with self._storing:
            if self._earlier:
                self._require_own_copy(self._earlier())
            await self._store(workers)
            self._earlier = None

    def _require_own_copy(self, earlier: InSyncSet) -> None:
        if earlier.replicas and not {*self._replicas} & {*earlier.replicas}:
            raise NotLeader("answers went on at another coordinator, so that their journal on this Mac lacks something")

    async def name(self, replicas: Sequence[str]) -> None:
        """Have another set stored at the workers of all rings. Raises the first error; then some may have it."""
        async with self._storing:
            self._replicas = tuple(replicas)
            self._version += 1
            await self._store(self._ring())

    def tell_spares(self) -> None:
        """Begin to tell spares that have not stored the present set yet. Those that do not answer are told again.

        Nobody is told before this leader is sure: its workers are spares until its first load.
        """
        if not self.is_sure:
            return
        present, spares = self._present, {spare.address: spare for spare in self._spares()}
        self._told = {address: stored for address, stored in self._told.items() if address in spares}
        for address, spare in spares.items():
            if self._told.get(address) != present and address not in self._telling:
                task = self._telling[address] = asyncio.create_task(self._tell(spare, present))
                task.add_done_callback(lambda _, address=address: self._telling.pop(address))  # type: ignore[misc]

    async def _tell(self, spare: NamingWorker, present: InSyncSet) -> None:
        with suppress(MacpipeError):
            await spare.name_in_sync(self._process, present)
            self._told[spare.address] = present

    @property
    def _present(self) -> InSyncSet:
        return InSyncSet(self._term(), self._version, self._replicas)

    async def _store(self, workers: Sequence[NamingWorker]) -> None:
        in_sync = self._present
        found = await asyncio.gather(
            *(worker.name_in_sync(self._process, in_sync) for worker in workers), return_exceptions=True
        )
        for error in found:
            if isinstance(error, BaseException):
                raise error
