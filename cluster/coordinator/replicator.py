"""Send a leader's state to its standbys, and have events wait until those that are in sync have stored it.

A copy is in sync if it has every record whose events have left. The leader's own journal is a copy like the others. A
copy that falls behind holds events back until the workers have stored a set without it (see ``in_sync_names``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from contextlib import suppress

from cluster.codec.leadership import encode_leadership
from cluster.coordinator.follower import Follower
from cluster.coordinator.in_sync_names import InSyncNames
from cluster.coordinator.journal_writer import JournalWriter
from cluster.core.errors import Busy, InvalidOption, MacpipeError
from cluster.core.leadership import CoordinatorName, LeadershipState, Replicate, StandbyState, StoredEdit
from cluster.core.limits import HEARTBEAT_S
from cluster.core.replication_limits import CONFIRM_S, MAX_STANDBYS, STORE_S
from cluster.membership.slowness import extra_s
from cluster.platform.continuous_clock import continuous_seconds
from cluster.platform.overload import Lag, no_lag
from cluster.v1 import leader_pb2 as pb

__all__ = ["Replicator"]

log = logging.getLogger(__name__)


class Replicator:
    """The standbys of one leader, whose own copy is ``replica``. Lives on the event loop that created it.

    ``mode`` is None if the journal is not replicated; then no copy is in sync, and ``names`` is not used.
    """

    def __init__(
        self,
        mode: Replicate | None,
        replica: str,
        names: InSyncNames | None = None,
        lag: Lag = no_lag,
        clock: Callable[[], float] = continuous_seconds,
    ) -> None:
        self.mode, self._replica, self._names, self._lag, self._clock = mode, replica, names, lag, clock
        self._loop = asyncio.get_running_loop()
        self._journal: JournalWriter | None = None
        self._files: dict[str, bytes | None] = {}
        self._leadership: LeadershipState | None = None
        self._followers: dict[str, Follower] = {}
        self._names_of = {replica: "this coordinator"}
        """Whose each copy is that follows, or may be in sync."""
        self._handed = 0
        """The last batch whose records were sent to all followers."""
        self._reached = {replica: 0}
        """By copy, the last batch of which it has stored all."""
        self._released = 0
        """The last batch whose events may have left."""
        self._problem = ""
        """Why the leader's own journal is not in sync; "" if it is."""
        self._named = frozenset({replica} if mode else ())
        self._naming = self._named
        """All copies that some worker may name: those of the last set that all have stored, and of later tries."""
        self._changed, self._progress = asyncio.Event(), asyncio.Event()
        self._is_untold = False
        """Whether a worker could not be told last, so that workers may name different sets."""
        self._stopped = False

    @property
    def in_sync(self) -> frozenset[str]:
        """The ids of the copies that the workers name."""
        return self._named

    @property
    def has_standby_in_sync(self) -> bool:
        """Whether another Mac has all that clients saw."""
        return bool(self._named - {self._replica})

    def attach(self, journal: JournalWriter) -> None:
        """Replicate this journal, whose ``replication`` this is. Call it before its first record."""
        self._journal = journal

    # What the standbys get

    def follow(self, name: CoordinatorName, replica: str) -> Follower:
        """Return a new follower, which gets a whole copy first. The same standby's earlier one is closed.

        Raises ``Busy`` if there are too many, or if this leader stops or may lack records itself, and ``InvalidOption``
        for the leader's own copy.
        """
        if replica == self._replica:
            raise InvalidOption(
                f"the state folder of {name.name} was copied from its leader's; start the standby with --home or"
                " MACPIPE_HOME set to a folder of its own"
            )
        if self._stopped:
            raise Busy("this coordinator stops")
        if self._names and not self._names.is_sure:
            raise Busy("this coordinator does not know yet whether its journal lacks something; follow again")
        if former := self._followers.pop(replica, None):
            former.close()
        if len(self._followers) >= MAX_STANDBYS:
            raise Busy(f"this leader has {MAX_STANDBYS} standbys, and takes no more")
        follower = self._followers[replica] = Follower(name, replica, self._clock)
        self._names_of[replica] = name.name
        if self._leadership:
            follower.put(self._encode_leadership(self._leadership))
        for file, content in self._files.items():
            follower.put(_encode_file(file, content))
        if not self.mode or not self._journal:
            follower.put_journal(b"")
            follower.complete()
        elif not self._journal.copy(lambda content: self._call(self._send_copy, follower, content)):
            del self._followers[replica]
            raise Busy("the leader's journal is behind; follow again")
        return follower

    def _send_copy(self, follower: Follower, content: bytes) -> None:
        follower.put_journal(content)
        follower.has_journal = True
        follower.complete()

    def leave(self, follower: Follower) -> None:
        """Forget a follower whose stream has ended."""
        follower.close()
        if self._followers.get(follower.replica) is follower:
            del self._followers[follower.replica]
            if follower.is_complete:  # one that cannot store its copy says why itself, and tries again and again
                log.info("replication: standby left name=%s replica=%s", follower.name.name, follower.replica)
            self._changed.set()
            self._progress.set()

    def acknowledge(self, follower: Follower, number: int) -> None:
        """Take note that a follower has stored its updates up to this number."""
        was_complete = follower.is_complete
        follower.acknowledge(number)
        if follower.is_complete and not was_complete:
            log.info("replication: standby follows name=%s replica=%s", follower.name.name, follower.replica)
        self._progress.set()
        if self._followers.get(follower.replica) is follower:
            self._reached[follower.replica] = follower.reached
            self._release()
            if self._may_be_in_sync(follower) != (follower.replica in self._named):
                self._changed.set()

    def publish(self, name: str, content: bytes | None) -> None:
        """Send a file of the leader's state, None if there is none, unless it is what was sent last."""
        if self._files.get(name) != content or (content is None and name not in self._files):
            self._files[name] = content
            self._send(_encode_file(name, content))

    def announce(self, leadership: LeadershipState) -> None:
        """Tell the standbys who leads. Its ``standbys`` that are not away are replaced by those that follow."""
        self._leadership = leadership
        self._send(self._encode_leadership(leadership))

    def standbys(self) -> tuple[StandbyState, ...]:
        """Return the standbys that follow, sorted by name."""
        followers = sorted(self._followers.values(), key=lambda one: (one.name.name, one.replica))
        return tuple(map(self._describe, followers))

    def _describe(self, one: Follower) -> StandbyState:
        in_sync = one.replica in self._named
        return StandbyState(one.name.name, one.name.addresses, in_sync, one.behind, self._why_not_in_sync(one))

    async def confirm(self) -> StoredEdit:
        """Return which standbys have stored all that they were sent until now, after ``CONFIRM_S`` at most."""
        sent = [(follower, follower.newest) for follower in self._followers.values()]

        def is_done(follower: Follower, number: int) -> bool:
            return follower.has_stored(number) or self._followers.get(follower.replica) is not follower

        await self._wait_for(lambda: all(is_done(*one) for one in sent), CONFIRM_S)
        stored, missing = list[StandbyState](), list[StandbyState]()
        for follower, number in sent:
            state = self._describe(follower)
            if follower.has_stored(number):
                stored.append(state)
            else:
                missing.append(dataclasses.replace(state, problem="it has not stored this in time"))
        return StoredEdit(tuple(stored), tuple(missing))

    def note_prepared(self, follower: Follower, *, is_prepared: bool) -> None:
        """Take note whether a follower has read what it needs to lead."""
        follower.is_prepared = is_prepared
        self._progress.set()

    def is_prepared(self, standby: StandbyState) -> bool:
        """Return whether a standby has read what it needs to lead."""
        return any(one.is_prepared for one in self._find(standby))

    async def wait_prepared(self, standby: StandbyState, most_s: float) -> bool:
        """Wait until a standby is prepared, or has left, at most ``most_s``. Return whether it is prepared."""
        await self._wait_for(lambda: self.is_prepared(standby) or not self._find(standby), most_s)
        return self.is_prepared(standby)

    def _find(self, standby: StandbyState) -> list[Follower]:
        known = standby.name, standby.addresses
        return [one for one in self._followers.values() if (one.name.name, one.name.addresses) == known]

    def _encode_leadership(self, leadership: LeadershipState) -> pb.FollowResponse:
        following = self.standbys()
        names = {one.name for one in following}
        away = tuple(one for one in leadership.standbys if one.away and one.name not in names)
        current = dataclasses.replace(leadership, replicate=self.mode, standbys=following + away)
        return pb.FollowResponse(leadership=encode_leadership(current))

    def _send(self, update: pb.FollowResponse) -> None:
        for follower in self._followers.values():
            own = pb.FollowResponse()
            own.CopyFrom(update)
            follower.put(own)

    # What the journal's thread says

    def append(self, records: bytes) -> None:
        """Send records of the journal. Any thread may call this."""
        self._call(self._send_records, pb.FollowResponse(records=records))

    def replace(self, content: bytes) -> None:
        """Send a whole journal in place of the records before it. Any thread may call this."""
        self._call(self._send_journal, content)

    def written(self, number: int, problem: str) -> None:
        """Take note of what is written here, see ``JournalReplication``. Any thread may call this."""
        self._call(self._on_written, number, problem)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    def _send_records(self, update: pb.FollowResponse) -> None:
        for follower in self._with_journal():
            own = pb.FollowResponse()
            own.CopyFrom(update)
            follower.put(own)

    def _send_journal(self, content: bytes) -> None:
        for follower in self._with_journal():
            follower.put_journal(content)

    def _with_journal(self) -> list[Follower]:
        return [follower for follower in self._followers.values() if follower.has_journal]

    def _on_written(self, number: int, problem: str) -> None:
        self._handed = number
        self._progress.set()
        for follower in self._with_journal():
            follower.reach(number)
            self._reached[follower.replica] = follower.reached
        if bool(problem) != bool(self._problem):
            self._changed.set()
        self._problem = problem
        if not problem:
            self._reached[self._replica] = number
        self._release()

    # Which copies are in sync

    def _release(self) -> None:
        """Let events leave whose records are on all copies that some worker may name."""
        stored = min((self._reached.get(copy, 0) for copy in self._naming), default=self._handed)
        self._released = max(self._released, stored)
        if self._journal and self._journal.gate:
            self._journal.gate.open_to(self._released)

    def _may_be_in_sync(self, follower: Follower) -> bool:
        """Whether a follower has a whole copy, and stores what comes; one that fell behind must have caught up."""
        most_s = STORE_S if follower.replica in self._named else HEARTBEAT_S
        return follower.has_journal and follower.is_complete and follower.silent_s < most_s + extra_s(self._lag())

    def _why_not_in_sync(self, follower: Follower) -> str:
        if follower.replica in self._named:
            return ""
        if not self.mode:
            return "the journal is not replicated; serve with --replicate"
        if not follower.is_complete:
            return "its copy is not complete yet"
        return f"it is {follower.behind} updates behind" if follower.behind else "the workers are being told"

    def _find_in_sync(self) -> frozenset[str]:
        found = {follower.replica for follower in self._followers.values() if self._may_be_in_sync(follower)}
        return frozenset(found if self._problem else {self._replica, *found})

    async def run(self) -> None:
        """Send beats, and keep the set of the copies in sync, until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_beats())
            if self.mode and self._names:
                tasks.create_task(self._keep_named(self._names))

    async def _send_beats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._send(pb.FollowResponse(beat=pb.Beat()))

    async def _keep_named(self, names: InSyncNames) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):  # a follower that falls silent tells nobody
                    await self._changed.wait()
            self._changed.clear()
            if (found := self._find_in_sync()) != self._named or self._naming != self._named or self._is_untold:
                await self._name(names, found)
            if self._naming == self._named and not self._is_untold:
                names.tell_spares()

    async def _name(self, names: InSyncNames, found: frozenset[str]) -> None:
        self._naming |= found  # from now on, events wait for those that are added, too
        if any(self._reached.get(copy, 0) < self._released for copy in found):
            return  # something left meanwhile that one of them lacks
        try:
            await names.name(sorted(found))
        except MacpipeError as e:
            if not self._is_untold:
                log.warning("replication: copies in sync not named, trying again reason=%s", e.sentence)
            self._is_untold = True
            return
        self._is_untold = False
        self._log_change(found)
        self._named = self._naming = found
        self._reached = {copy: batch for copy, batch in self._reached.items() if copy in self._kept()}
        self._names_of = {copy: name for copy, name in self._names_of.items() if copy in self._kept()}
        self._release()
        if self._leadership:
            self.announce(self._leadership)

    def _log_change(self, found: frozenset[str]) -> None:
        """Log whose copies are in sync now. One that left is a warning: it could not go on with the answers."""
        joined, left = (
            ",".join(sorted(self._names_of.get(copy, copy) for copy in copies)) or "none"
            for copies in (found - self._named, self._named - found)
        )
        level = logging.INFO if found >= self._named else logging.WARNING
        log.log(level, "replication: copies in sync changed copies=%d joined=%s left=%s", len(found), joined, left)

    def _kept(self) -> set[str]:
        return {self._replica, *self._named, *self._followers}

    # The end

    async def stop(self, why: MacpipeError, handover: str = "") -> None:
        """Stop recording, send what is recorded, then say that this leader stops, to be followed by ``handover``.

        Return once all standbys have stored that, or have had ``STORE_S`` for it. Events that wait then are dropped,
        and their readers get ``why``.
        """
        self._stopped = True
        if self._journal:
            last = self._journal.freeze()
            await self._wait_for(lambda: self._handed >= last)
        self._send(pb.FollowResponse(stopping=pb.LeaderStopping(handover=handover)))
        await self._wait_for(lambda: not any(follower.behind for follower in self._followers.values()))
        for follower in self._followers.values():
            follower.close()
        if self._journal and self._journal.gate:
            self._journal.gate.end(why)

    async def _wait_for(self, is_done: Callable[[], bool], most_s: float = STORE_S) -> None:
        """Wait until something is done, at most ``most_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s + extra_s(self._lag())):
                while not is_done():
                    self._progress.clear()
                    await self._progress.wait()


def _encode_file(name: str, content: bytes | None) -> pb.FollowResponse:
    file = pb.ReplicatedFile(name=name, content=content or b"", missing=content is None)
    return pb.FollowResponse(file=file)
