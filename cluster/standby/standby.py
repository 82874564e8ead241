"""Stand by for the leader of a cluster: follow it while it leads, and take its place once it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeAlias

from cluster.coordinator.model_reader import ModelReader
from cluster.coordinator.replicated_service import ReplicatedService
from cluster.coordinator.roster import Roster
from cluster.core.errors import MacpipeError, MemberRemoved, NoWorkers
from cluster.core.leadership import CoordinatorName, FollowingState, LeadershipState, Replicate
from cluster.core.limits import GONE_S, HEARTBEAT_S
from cluster.core.replication_limits import IN_SYNC_WAIT_S
from cluster.core.term_limits import LEASE_S
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.leadership import Leadership
from cluster.membership.slowness import extra_s
from cluster.platform.continuous_clock import continuous_seconds
from cluster.platform.overload import Lag, no_lag
from cluster.standby.election import Election
from cluster.standby.model_fit import ModelFit
from cluster.standby.other_coordinators import OtherCoordinators

__all__ = ["LeaderStream", "OpenStream", "Standby", "StandbyReplica", "Succession"]

log = logging.getLogger(__name__)

LOOK_S: Final = 2 * HEARTBEAT_S
"""How often a standby looks for a leader while none is known."""
MAX_COPY_PAUSE_S: Final = 5.0
"""Longest pause of a standby whose copies end before they are whole. The first is ``LOOK_S``, and each is twice the
last."""
ALIVE_S: Final = 0.2
"""A leader of which only the stream broke answers within this time, and is followed again."""
SAY_AGAIN_S: Final = 60.0
"""How often at most the log has one problem: two that alternate, such as two ways not to answer, fill no log."""
_MOST_SAID: Final = 16
"""Most problems of which it is known when the log had them."""
_LACKS_RECORDS: Final = (
    f"its copy lacks part of the answers; for {IN_SYNC_WAIT_S:.0f} s it waits for a Mac that has all"
)


class LeaderStream(Protocol):
    """The stream in which the leader sends its state and its changes."""

    heard_at: float
    """When the leader was heard last, in seconds of the continuous clock."""
    leadership: LeadershipState | None
    """What it said last of itself and its standbys."""
    ended: asyncio.Event
    """Set once the stream has ended, for whatever reason."""
    handover: str | None
    """Which standby shall lead, once the leader said that it stops; "" if any may. None if it did not say so."""
    error: MacpipeError | None
    """Why the stream ended; None while it lasts."""

    def tell_prepared(self, *, is_prepared: bool) -> None:
        """Tell the leader whether this standby has read what it needs to lead."""


OpenStream: TypeAlias = Callable[[str], AbstractAsyncContextManager[LeaderStream]]
"""Follows the leader at an address. Raises ``MacpipeError`` if it cannot be followed."""


class StandbyReplica(Protocol):
    """The copy of the leader's state on this Mac."""

    @property
    def is_complete(self) -> bool:
        """Whether it is a whole copy; the files alone may be there before that."""

    def service(self) -> ReplicatedService:
        """Return what the leader served. Raises ``MacpipeError`` if it cannot be read."""

    def is_in_sync(self, named: InSyncSet) -> bool:
        """Return whether the copy has everything that clients saw, given the set that the workers name."""


@dataclass(frozen=True, slots=True)
class Succession:
    """What a standby leads with: the roster whose process has the term, and the service that it goes on with.

    ``newest_epoch`` is above all epochs of earlier terms that its workers know. ``may_resume``: the journal's copy has
    everything that clients saw. ``reader`` has begun to read the default model if that was loaded; whoever leads closes
    it.
    """

    roster: Roster
    leadership: Leadership
    service: ReplicatedService
    newest_epoch: int
    may_resume: bool
    reader: ModelReader

    @property
    def had_loaded_default(self) -> bool:
        """Whether the leader before had loaded the default model."""
        return self.service.models[0].name in self.service.loaded


class Standby:
    """Follows the leader among ``others``, and stands for election when there is none.

    ``create_roster`` returns the roster of the workers that the service names, for a new process. ``addresses`` returns
    where else a coordinator may be: what the user named, and what is announced now. ``lag`` is that of this machine.
    """

    def __init__(
        self,
        others: OtherCoordinators,
        replica: StandbyReplica,
        open_stream: OpenStream,
        create_roster: Callable[[ReplicatedService], Roster],
        fit: ModelFit,
        addresses: Callable[[], Iterable[str]] = tuple,
        lag: Lag = no_lag,
    ) -> None:
        self._others, self._replica, self._open_stream = others, replica, open_stream
        self._create_roster, self._fit = create_roster, fit
        self._addresses, self._lag = addresses, lag
        self.leadership: LeadershipState | None = None
        """What the leader said last; None while none is followed."""
        self._said = dict[str, float]()
        """When the log had each problem, in seconds of the continuous clock, the last one last; none while it follows.
        """
        self._followed = ("", "")
        """The leader's process that the log had last as followed, and its address."""
        self._copy_pause_s = LOOK_S
        """How long to wait after a copy that ends before it is whole."""
        self._leaderless_since: float | None = None
        """When nobody was found to lead, in seconds of the continuous clock; None while somebody does."""
        self._in_sync = NOT_NAMED
        """The latest set of copies in sync that a worker named since then."""

    @property
    def problem(self) -> str:
        """Why this standby does not follow, or cannot lead; "" if nothing is wrong."""
        return self._others.problem

    @property
    def state(self) -> FollowingState:
        """Whether this standby follows, and how far it is."""
        others, told = self._others, self.leadership
        me = others.me
        own = [one for one in told.standbys if (one.name, one.addresses) == (me.name, me.addresses)] if told else []
        return FollowingState(others.term, others.leader, told is not None, any(one.in_sync for one in own))

    def _note_problem(self, what: str, error: MacpipeError) -> None:
        """Tell whoever asks what cannot be done, and the log, unless that is the last problem that it has."""
        self._others.problem = problem = f"{what}: {error.sentence}"
        now, said_at = continuous_seconds(), self._said.get(problem)
        is_last = problem == next(reversed(self._said), None)
        if not is_last and (said_at is None or now - said_at >= SAY_AGAIN_S):
            self._said.pop(problem, None)
            self._said[problem] = now
            self._said = dict([*self._said.items()][-_MOST_SAID:])
            log.warning("standby: not following reason=%s", problem)

    def _end_problem(self) -> None:
        if self._said:
            log.info("standby: follows again")
        self._others.problem = ""
        self._said.clear()
        self._copy_pause_s = LOOK_S

    def _note_followed(self, leader: CoordinatorName, address: str) -> None:
        """Tell the log who is followed, but not again and again while copies of one leader end with a problem."""
        if not self._said or (leader.instance, address) != self._followed:
            log.info("standby: following leader=%s address=%s", leader.name, address)
        self._followed = leader.instance, address

    async def run(self, patience_s: float = 0.0) -> Succession:
        """Return once this process has been elected. Look only for a leader in the first ``patience_s`` seconds.

        Raises ``MemberRemoved`` once a leader, another coordinator or a worker says that it was removed from the
        cluster. Who does not answer ends no standby.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._wait_for_leader()
        while True:
            leader = await self._find_leader()
            if leader and not await self._follow(leader):
                continue
            self._leaderless_since = self._leaderless_since or continuous_seconds()
            try:
                service = self._replica.service()
            except MacpipeError as e:
                self._note_problem("no leader answers, and this Mac cannot take its place", self._why_alone(e))
                await asyncio.sleep(LOOK_S)
                continue
            if succession := await self._stand(service):
                return succession

    def _why_alone(self, error: MacpipeError) -> MacpipeError:
        """Return why no coordinator could be asked who leads; ``error`` if none was known."""
        failures = self._others.failures
        return MacpipeError.of(failures[0].reason, f"{failures[0].sentence}; {error.sentence}") if failures else error

    async def _find_leader(self) -> CoordinatorName | None:
        """Return who leads; None if nobody does. Raises ``MemberRemoved`` if those that answer refuse this Mac so."""
        leader = await self._others.find_leader((*self._others.addresses, *self._addresses()))
        removal = next((one for one in self._others.failures if isinstance(one, MemberRemoved)), None)
        if removal and not leader:
            raise removal
        return leader

    async def _follow(self, leader: CoordinatorName) -> bool:
        """Follow a leader. Return whether it is lost: it has been silent for as long as it may be, and nobody leads."""
        stream = None
        for address in leader.addresses:
            try:
                async with self._open_stream(address) as stream:
                    self._note_followed(leader, address)
                    self._leaderless_since, self._in_sync = None, NOT_NAMED
                    await self._watch(stream)
            except MemberRemoved:
                raise
            except MacpipeError as e:
                self._note_problem(f"cannot follow {leader.name}", e)
            if stream:
                break
        self.leadership = None
        self._others.lose(leader)
        if stream is None:
            await asyncio.sleep(LOOK_S)
            return False
        if stream.handover is not None:
            log.info("standby: the leader stops leader=%s", leader.name)
        elif isinstance(stream.error, MemberRemoved):
            raise stream.error
        elif stream.error:
            self._note_problem(f"cannot follow {leader.name} any more", stream.error)
        if stream.handover is None and not self._replica.is_complete:
            await asyncio.sleep(self._copy_pause_s)  # another copy will most likely end as this one did
            self._copy_pause_s = min(2 * self._copy_pause_s, MAX_COPY_PAUSE_S)
        wait_s = self._patience_s(stream) - (continuous_seconds() - stream.heard_at)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s if stream.handover is not None else max(wait_s, ALIVE_S)):
                await self._wait_for_leader()
                return False
        return True

    async def _watch(self, stream: LeaderStream) -> None:
        """Keep what the leader says until its stream ends, or has been silent for much longer than a beat."""
        while not stream.ended.is_set() and continuous_seconds() - stream.heard_at < GONE_S + extra_s(self._lag()):
            if stream.leadership and stream.leadership != self.leadership:
                self.leadership = stream.leadership
                self._others.hear_followed(stream.leadership)
            if self._replica.is_complete:
                self._end_problem()
                with suppress(MacpipeError):
                    await self._fit.prepare(self._replica.service())
                    stream.tell_prepared(is_prepared=self._fit.is_prepared)
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await stream.ended.wait()

    def _patience_s(self, stream: LeaderStream) -> float:
        """Return how long a leader may be silent before this standby asks the workers.

        The first of those in sync asks at once, and so does the one that the leader chose: if the leader is alive after
        all, the leases of its workers protect it. The others wait, so that not all ask at once.
        """
        me = self._others.me
        if stream.handover is not None:
            return 0.0 if stream.handover in ("", me.name) else GONE_S + LEASE_S
        standbys = stream.leadership.standbys if stream.leadership else ()
        own = (me.name, me.addresses)
        turns = [(one.name, one.addresses) for one in standbys if one.in_sync]
        if own not in turns:
            return GONE_S + (LEASE_S if turns else 0.0)
        return GONE_S + HEARTBEAT_S * turns.index(own) if turns[0] != own else 0.0

    async def _stand(self, service: ReplicatedService) -> Succession | None:
        """Stand for election until it is won, or until somebody leads: then return None."""
        await self._fit.prepare(service)
        roster = self._create_roster(service)
        election = Election(roster.terms.process, roster, self._fit, may_lead=partial(self._may_lead, service))
        log.info("standby: standing for election workers=%d", len(service.workers))
        running = asyncio.create_task(election.run())
        watching = asyncio.create_task(self._wait_for_leader())
        won = False
        both = (running, watching)
        try:
            while not (await asyncio.wait(both, timeout=2 * LOOK_S, return_when=asyncio.FIRST_COMPLETED))[0]:
                # without an answer, it is not known which copies are in sync
                waits = election.found and not self._may_lead(service, election.in_sync)
                why = NoWorkers(self._fit.problem or (_LACKS_RECORDS if waits else election.problem))
                self._note_problem("no leader answers, and this Mac cannot take its place yet", self._why_alone(why))
            if not running.done():
                watching.result()
                return None
            leadership = running.result()
            if not self._may_lead(service, election.in_sync):  # of workers that answered after the first grants
                await election.withdraw()
                return None
            won = True
        finally:
            for task in (running, watching):
                task.cancel()
            await asyncio.gather(running, watching, return_exceptions=True)
            self._in_sync = max(self._in_sync, election.in_sync)
            if not won:
                await roster.close()
        may_resume = self._has_all(service, election.in_sync)
        log.warning("standby: elected term=%d may_resume=%s", leadership.term.number, may_resume)
        roster.silent = roster.addresses() - election.found
        roster.terms.begin(leadership, election.clients(leadership.workers))
        return Succession(roster, leadership, service, election.newest_epoch, may_resume, self._fit.reader)

    def _may_lead(self, service: ReplicatedService, named: InSyncSet) -> bool:
        """Return whether to lead now: the answers that were live can be resumed, or who could do that does not come."""
        if self._has_all(service, max(named, self._in_sync)) or not service.loaded:
            return True
        waited_s = continuous_seconds() - (self._leaderless_since or 0.0)
        return waited_s >= IN_SYNC_WAIT_S + extra_s(self._lag())

    def _has_all(self, service: ReplicatedService, named: InSyncSet) -> bool:
        """Return whether the copy on this Mac has all that clients saw, if the workers name these copies."""
        in_sync = service.replicate is not Replicate.SYNC or self._replica.is_in_sync(named)
        return in_sync and self._replica.is_complete

    async def _wait_for_leader(self) -> None:
        """Return once somebody leads."""
        while True:
            if await self._find_leader():
                return
            await asyncio.sleep(LOOK_S)
