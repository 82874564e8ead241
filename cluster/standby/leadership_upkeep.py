"""Stay the leader beside standbys: keep all workers, send what changed, and notice who leads by a higher term."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio.to_thread

from cluster.coordinator.replicated_service import SERVICE_FILE, ReplicatedService
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.roster import Roster
from cluster.coordinator.state_files import StateFiles
from cluster.core.errors import ClusterDamaged
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeadershipState, StandbyState, StoredEdit
from cluster.core.limits import HEARTBEAT_S
from cluster.platform.continuous_clock import continuous_seconds
from cluster.platform.private_files import replace_file
from cluster.security.trust import COORDINATOR
from cluster.standby.other_coordinators import OtherCoordinators

__all__ = ["LeadershipUpkeep"]

log = logging.getLogger(__name__)

TELL_S: Final = 2 * HEARTBEAT_S
"""Pause between two rounds in which the other coordinators are told."""


class LeadershipUpkeep:
    """What a leader does beside serving, for as long as it knows of other coordinators; next to nothing before that.

    ``files`` are its state, and ``service`` returns what it serves now, which is kept in ``file`` for its next start.
    """

    def __init__(
        self,
        others: OtherCoordinators,
        roster: Roster,
        replicator: Replicator,
        files: StateFiles,
        service: Callable[[], ReplicatedService],
        file: Path,
    ) -> None:
        self._others, self._roster, self._replicator = others, roster, replicator
        self._files, self._service, self._file = files, service, file
        self._served: ReplicatedService | None = None
        """What was published last."""
        self._is_kept = False
        """Whether ``file`` has it."""
        self._publishing = asyncio.Lock()
        """Held until what one call found to be new has been sent: another call would not find it any more."""
        self._publications: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()
        self._term, self._since = 0, continuous_seconds()
        self._announced: LeadershipState | None = None

    def end(self) -> None:
        """Have ``run`` return, and claim to lead no more: a standby is to lead, or another coordinator leads."""
        self._ending.set()

    async def run(self) -> None:
        """Return once another coordinator leads by a higher term, or shall lead."""
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(self._keep_telling())
            await self._keep_workers()
            telling.cancel()

    async def _keep_workers(self) -> None:
        while True:
            if self._others.addresses:
                await self.publish()
                controls = [self._roster.control(address) for address in self._roster.addresses()]
                await self._roster.terms.renew(controls)
            else:
                self._claim()
            if self._others.is_superseded:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._ending.wait()
                    return

    async def publish(self) -> None:
        """Send standbys what changed: who leads, what is served, and files. Call it before one begins to follow.

        What was found to be new is sent even if the caller goes away meanwhile.
        """
        self._claim()
        task = asyncio.create_task(self._publish_changed())
        self._publications.add(task)
        task.add_done_callback(self._publications.discard)
        await asyncio.shield(task)

    async def _publish_changed(self) -> None:
        async with self._publishing:
            for name, content in (await anyio.to_thread.run_sync(self._files.read_changed)).items():
                self._replicator.publish(name, content)
            if (served := self._service()) != self._served:
                self._served, self._is_kept = served, False
                self._replicator.publish(SERVICE_FILE, served.encode())
            if self._others.addresses and not self._is_kept:
                self._is_kept = True
                await anyio.to_thread.run_sync(self._keep, served.encode())

    async def confirm(self) -> StoredEdit:
        """Send standbys what changed. Return which of them have stored it, after ``CONFIRM_S`` at most."""
        await self.publish()
        edit = await self._replicator.confirm()
        return replace(edit, missing=edit.missing + self._away())

    def _claim(self) -> None:
        """Lead by the present term, and tell the standbys so if that changed; after ``end``, do nothing."""
        if self._ending.is_set():
            return
        number = self._roster.terms.number
        if number != self._term:
            self._term, self._since = number, continuous_seconds()
        self._others.lead(number)
        standbys = self._replicator.standbys()
        self._others.hear_following(CoordinatorName(one.name, "", one.addresses) for one in standbys)
        now = _without_times(self._state())
        if now != self._announced:
            self._announced = now
            self._replicator.announce(self._state())

    def _keep(self, service: bytes) -> None:
        try:
            replace_file(self._file, service)
        except OSError as e:
            log.warning("service: not kept for the next start reason=%s file=%s", e.strerror, self._file)

    async def _keep_telling(self) -> None:
        """Tell those that do not follow who leads, and hear who leads there. One that is gone holds up nothing else."""
        while True:
            following = {address for one in self._replicator.standbys() for address in one.addresses}
            silent = [address for address in self._others.addresses if address not in following]
            await asyncio.gather(*map(self._others.ask, silent))
            await asyncio.sleep(TELL_S)

    @property
    def state(self) -> LeadershipState | None:
        """Who leads, for ``status``; None if no other coordinator was ever known."""
        return self._state() if self._others.addresses else None

    def _standbys(self) -> tuple[StandbyState, ...]:
        """Return the standbys that follow, and those that do not, although they were heard."""
        return self._replicator.standbys() + self._away()

    def _away(self) -> tuple[StandbyState, ...]:
        following = {one.name for one in self._replicator.standbys()}
        return tuple(one for one in self._others.away(self._members()) if one.name not in following)

    def _members(self) -> frozenset[str] | None:
        """Return the names of the cluster's coordinators; None without a cluster, or if they cannot be read now."""
        members = self._roster.trust.members
        if members is None:
            return None
        try:
            return frozenset(member.name for member in members.current() if member.role == COORDINATOR)
        except ClusterDamaged:
            return None

    def _state(self) -> LeadershipState:
        return LeadershipState(
            CoordinatorRole.LEADER,
            self._term,
            self._others.me,
            continuous_seconds() - self._since,
            self._replicator.mode,
            self._standbys(),
            tuple(claim.coordinator for claim in self._others.others.values()),
        )


def _without_times(state: LeadershipState) -> LeadershipState:
    """Return what standbys need not be told again only since time has passed."""
    standbys = tuple(replace(one, silent_seconds=0.0) for one in state.standbys)
    return replace(state, since_seconds=0.0, standbys=standbys)
