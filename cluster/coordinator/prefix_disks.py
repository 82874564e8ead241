"""Use the prefixes on the workers' disks: open the disks of an epoch, and have all stages read one prefix.

Disks are used in an epoch only if every stage has one. Who may have prefixes is asked anew each time and told to each
worker that has a disk, used or not, so that it deletes those of a revoked key before it serves anybody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from cluster.coordinator.epoch import Epoch
from cluster.core.errors import DeadlineExceeded, MacpipeError, WorkerLost
from cluster.core.prefix_limits import DISK_OPEN_S
from cluster.scheduler.disk_prefixes import DiskContents, DiskRead, ReadOutcome

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrefixOwners:
    """Names of those who may have prefixes on disk. ``anonymous``: so may all callers, since nobody needs a key."""

    names: frozenset[str] = frozenset()
    anonymous: bool = True


OwnersOf = Callable[[], PrefixOwners]
"""Returns the present owners. Raises ``MacpipeError`` if they cannot be known. Runs on a thread."""


class PrefixDisks:
    """The disks of a model's stages, through any number of epochs."""

    def __init__(self, owners: OwnersOf) -> None:
        self._owners = owners
        self._epoch: Epoch | None = None
        self._edition = ""
        self._opened_for: PrefixOwners | None = None
        self.problem = ""
        """Why disks of workers are not used in this epoch, for people; "" where they are, or if there are none."""

    async def open(self, epoch: Epoch, edition: str) -> DiskContents | None:
        """Open the disks of an epoch. Return what all stages have there; None if they cannot be used.

        ``edition`` names the model's edition; empty: it is unknown.
        """
        self._epoch, self._edition, self._opened_for, self.problem = epoch, edition, None, ""
        lacking = [worker.name for worker in epoch.workers if not worker.prefix_disk_limit]
        if len(lacking) == len(epoch.workers):
            return None
        if epoch.plan.is_grouped:
            self.problem = "no prefix is kept on disk: Macs that share layers as a group cannot do that yet"
            log.warning("prefixes: disks not used in this epoch reason=%s epoch=%d", self.problem, epoch.plan.epoch)
            return None
        try:
            async with asyncio.timeout(DISK_OPEN_S):
                owners = await anyio.to_thread.run_sync(self._owners)
                found = await self._open_all(epoch, owners)
        except (MacpipeError, TimeoutError) as e:
            why = e.sentence if isinstance(e, MacpipeError) else f"no answer within {DISK_OPEN_S:.0f} s"
            log.warning("prefixes: disks not used in this epoch reason=%s epoch=%d", why, epoch.plan.epoch)
            return None
        self._opened_for = owners
        if lacking or not edition:
            why = f"{', '.join(lacking)} runs without --prefix-disk" if lacking else "not all digests are known"
            log.warning("prefixes: disks not used in this epoch reason=%s epoch=%d", why, epoch.plan.epoch)
            return None
        shared = set(found[0]).intersection(*found[1:])
        return DiskContents(edition, tuple(beginning for beginning in found[0] if beginning in shared))

    async def follow_owners(self) -> None:
        """Have the prefixes of owners who are gone deleted, if there are any since the disks were opened."""
        epoch = self._epoch
        if epoch is None or self._opened_for is None:
            return
        try:
            async with asyncio.timeout(DISK_OPEN_S):
                owners = await anyio.to_thread.run_sync(self._owners)
                if owners != self._opened_for and epoch is self._epoch:
                    await self._open_all(epoch, owners)
                    self._opened_for = owners
        except (MacpipeError, TimeoutError) as e:  # tried again soon
            log.warning("prefixes: owners not told to the workers reason=%s", e)

    async def _open_all(self, epoch: Epoch, owners: PrefixOwners) -> list[list[tuple[int, bytes]]]:
        calls = (
            control.open_prefixes(epoch.plan.epoch, self._edition, owners.names, anonymous=owners.anonymous)
            for worker, control in zip(epoch.workers, epoch.controls, strict=True)
            if worker.prefix_disk_limit
        )
        return await asyncio.gather(*calls)

    async def read(self, order: DiskRead) -> tuple[ReadOutcome, float]:
        """Have all stages read a prefix. Return whether they did, and the seconds that it took."""
        epoch, began = self._epoch, time.monotonic()
        if epoch is None or epoch.plan.epoch != order.epoch:
            return ReadOutcome.MISS, 0.0
        calls = [asyncio.ensure_future(control.read_prefix(order)) for control in epoch.controls]
        try:
            async with asyncio.timeout(order.timeout_s):
                await asyncio.gather(*calls)
        except (TimeoutError, DeadlineExceeded):
            return ReadOutcome.LATE, time.monotonic() - began
        except MacpipeError as e:
            late = isinstance(e, WorkerLost) and time.monotonic() - began >= order.timeout_s
            log.info("prefixes: not read from disk reason=%s tokens=%d", e.sentence, order.length)
            return (ReadOutcome.LATE if late else ReadOutcome.MISS), time.monotonic() - began
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        return ReadOutcome.HIT, time.monotonic() - began
