"""Know the other coordinators of a cluster: where they are, and which of them leads.

Each tells the others what it is. A leader that hears of a higher term from one of them has been replaced. That is why
only coordinators of the cluster may tell it: ``hear`` must be called for authenticated ones alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from cluster.core.errors import DeadlineExceeded, MacpipeError
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim, LeadershipState, StandbyState
from cluster.core.limits import GONE_S, MAX_FACT_CHARS, MAX_SENTENCE_CHARS, REMEMBER_S
from cluster.platform.continuous_clock import continuous_seconds
from cluster.platform.json_file import read_json, write_json

__all__ = ["MAX_COORDINATORS", "AskCoordinator", "OtherCoordinators"]

log = logging.getLogger(__name__)

MAX_COORDINATORS: Final = 16
"""Most other coordinators that are remembered, and asked."""
MAX_ADDRESSES: Final = 8
"""Most addresses of one coordinator that are believed."""
_MOST_HOPS: Final = 3
"""How often those that are named are asked in turn."""
_SILENT_S: Final = 2 * GONE_S
"""A coordinator that was not heard for this long does not answer."""
_MAX_FILE_BYTES: Final = 64 * 1024
AskCoordinator: TypeAlias = Callable[[str, LeaderClaim], Awaitable[LeaderClaim]]
"""Tells the coordinator at an address a claim, and returns its own. Raises ``MacpipeError``."""


@dataclass(frozen=True, slots=True)
class _Heard:
    """A coordinator that was heard ``at`` some moment, and its problem then."""

    name: CoordinatorName
    problem: str
    at: float


class OtherCoordinators:
    """The coordinators beside ``me``. ``file`` keeps their addresses across restarts; None keeps them in memory.

    ``ask`` calls one of them. ``clock`` returns seconds, and counts sleep.
    """

    def __init__(
        self,
        me: CoordinatorName,
        ask: AskCoordinator,
        file: Path | None = None,
        clock: Callable[[], float] = continuous_seconds,
    ) -> None:
        self.me, self._ask, self._file, self._clock = me, ask, file, clock
        self.role = CoordinatorRole.STANDBY
        self.term = 0
        """The highest term of a leader that this process knows; its own while it leads."""
        self.leader: CoordinatorName | None = None
        """Who leads by that term; None if nobody is known to."""
        self._said = ("", 0)
        """The process that the log had last as the leader, and its term."""
        self.changed = asyncio.Event()
        """Set when somebody leads, or is said to. The waiter clears it."""
        self.others: dict[str, LeaderClaim] = {}
        """What other leaders of a lower term said last, by their process."""
        self.problem = ""
        """Why this process neither leads nor follows; "" if nothing is wrong. The others are told."""
        self._known = _read(file)
        self._heard = {one.name: _Heard(one, "", clock() - _SILENT_S) for one in self._known.values()}
        """When each other one was heard last, by its name: one that came back at another address is the same."""
        self._beside: tuple[CoordinatorName, ...] = ()
        """The other standbys of the leader that is followed, as it said last."""
        self._failures: dict[str, MacpipeError] = {}
        """Why coordinators did not answer, by the addresses that were asked last."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The gRPC addresses of all known coordinators, the last heard ones first."""
        return tuple(address for name in reversed(self._known.values()) for address in name.addresses)

    def addresses_of(self, name: str) -> tuple[str, ...]:
        """Return the gRPC addresses of the known coordinators with this name, the last heard one first."""
        return tuple(address for one in reversed(self._known.values()) if one.name == name for address in one.addresses)

    def hears(self, name: str) -> bool:
        """Return whether a coordinator of this name was heard just now, as one that leads or stands by."""
        now = self._clock()
        heard = (one.name.name for one in self._heard.values() if now - one.at <= _SILENT_S)
        return name in (*heard, self.leader.name if self.leader else "")

    @property
    def claim(self) -> LeaderClaim:
        """What this process tells others."""
        return LeaderClaim(self.me, self.role, self.term, self.leader, self.problem)

    @property
    def is_superseded(self) -> bool:
        """Whether this process led, and another one leads by a higher term."""
        return self.role is CoordinatorRole.LEADER and self.leader is not None and not self._is_me(self.leader)

    def lead(self, term: int) -> None:
        """Lead by this term from now on, 0 before the first; unless another one leads by a higher term."""
        self.role, self.problem = CoordinatorRole.LEADER, ""
        if self.leader is None or self._is_me(self.leader) or term > self.term:
            self.term, self.leader = term, self.me

    def stand_by(self) -> None:
        """Lead no more."""
        self.role = CoordinatorRole.STANDBY
        self.lose(self.me)

    def lose(self, leader: CoordinatorName) -> None:
        """Note that this one does not lead any more. Until now, it and those who followed it were heard."""
        if self.leader and self.leader.instance == leader.instance:
            for one in self._beside:
                self._note(one)
            self._note(leader, "it led before, and was not heard since")
            self.leader, self._beside = None, ()

    def hear(self, claim: LeaderClaim) -> LeaderClaim:
        """Take what an authenticated coordinator says. Return what this process says."""
        if self._is_me(claim.coordinator):
            return self.claim
        self.remember([claim.coordinator])
        if claim.role is CoordinatorRole.LEADER:
            self._hear_leader(claim)
        else:
            self.others.pop(claim.coordinator.instance, None)
            self.lose(claim.coordinator)
        self._note(claim.coordinator, claim.problem)
        return self.claim

    def _hear_leader(self, claim: LeaderClaim) -> None:
        instance = claim.coordinator.instance
        self.others.pop(instance, None)
        if claim.term > self.term or (self.leader is None and claim.term >= self.term):
            if self._said != (instance, claim.term):  # one whose stream ended is found again and again
                log.info("leader: found leader=%s term=%d", claim.coordinator.name, claim.term)
                self._said = instance, claim.term
            if self.leader and self.leader.instance != instance:
                self.lose(self.leader)
            self.term, self.leader = claim.term, claim.coordinator
            self.changed.set()
        elif self.leader and self.leader.instance != instance:
            self.others[instance] = claim
            self.others = dict([*self.others.items()][-MAX_COORDINATORS:])

    def remember(self, found: Iterable[CoordinatorName]) -> None:
        """Remember where coordinators are. The ones that were not heard for the longest time are forgotten first."""
        before = dict(self._known)
        for one in found:
            if one.addresses and one.name and not self._is_me(one):
                kept = _bounded(one)
                self._known.pop(key := _key(kept), None)
                self._known[key] = kept
        self._known = dict([*self._known.items()][-MAX_COORDINATORS:])
        if self._file and {*self._known.values()} != {*before.values()}:
            _write(self._file, [*self._known.values()])

    def hear_following(self, found: Iterable[CoordinatorName]) -> None:
        """Remember the standbys that follow this process."""
        following = tuple(found)
        self.remember(following)
        for one in following:
            self._note(one)

    def _note(self, name: CoordinatorName, problem: str = "", silent_s: float = 0.0) -> None:
        """Note that this coordinator was heard, so many seconds ago."""
        if name.addresses and name.name and not self._is_me(name):
            kept = _bounded(name)
            self._heard.pop(kept.name, None)
            self._heard[kept.name] = _Heard(kept, problem[:MAX_SENTENCE_CHARS], self._clock() - silent_s)
            self._heard = dict([*self._heard.items()][-MAX_COORDINATORS:])

    def away(self, members: Collection[str] | None = None) -> tuple[StandbyState, ...]:
        """Return the coordinators that were heard and do not lead, as if none of them followed now.

        ``members`` are the names of the cluster's coordinators: those that were removed are left out. None: there is no
        cluster from which one could be removed, so those that were silent for ``REMEMBER_S`` are left out.
        """
        now = self._clock()
        leading = {claim.coordinator.name for claim in self.others.values()} | {self.me.name}
        leading |= {self.leader.name} if self.leader else set()
        return tuple(
            _describe_away(one, now - one.at)
            for name, one in sorted(self._heard.items())
            if name not in leading and (now - one.at < REMEMBER_S if members is None else name in members)
        )

    def hear_followed(self, state: LeadershipState) -> None:
        """Remember the leader that is followed, its other standbys, and those that do not follow it any more."""
        others = [one for one in state.standbys if one.addresses != self.me.addresses]
        for one in others:
            self._note(CoordinatorName(one.name, "", one.addresses), one.problem, one.silent_seconds)
        self._beside = tuple(CoordinatorName(one.name, "", one.addresses) for one in others if not one.away)
        self.remember((*self._beside, *([state.leader] if state.leader else [])))
        if state.leader and state.term >= self.term and self.role is CoordinatorRole.STANDBY:
            self.term, self.leader = state.term, state.leader

    async def ask(self, address: str) -> LeaderClaim | None:
        """Exchange claims with the coordinator at an address. Return its claim; None if it does not answer."""
        try:
            async with asyncio.timeout(GONE_S):
                claim = await self._ask(address, self.claim)
        except MacpipeError as e:
            self._failures[address] = e
            return None
        except TimeoutError:
            self._failures[address] = DeadlineExceeded(f"the other coordinator at {address} does not answer")
            return None
        self._failures.pop(address, None)
        self.hear(claim)
        return claim

    async def find_leader(self, addresses: Iterable[str]) -> CoordinatorName | None:
        """Ask those at these addresses, and those that they name, who leads. Return who does; None if nobody does.

        One that is only named is asked itself: who named it may not know yet that it is gone.
        """
        asked = dict[str, None]()  # in order
        found = list[LeaderClaim]()
        coming = [*dict.fromkeys(addresses)][:MAX_COORDINATORS]
        for _ in range(_MOST_HOPS):
            asked.update(dict.fromkeys(coming))
            claims = [claim for claim in await asyncio.gather(*map(self.ask, coming)) if claim]
            found += [claim for claim in claims if claim.role is CoordinatorRole.LEADER]
            named = [address for claim in claims if claim.leader for address in claim.leader.addresses[:MAX_ADDRESSES]]
            coming = [address for address in dict.fromkeys(named) if address not in asked][:MAX_COORDINATORS]
        self._failures = {address: self._failures[address] for address in asked if address in self._failures}
        leading = [claim for claim in found if not self._is_me(claim.coordinator)]
        return max(leading, key=lambda claim: claim.term).coordinator if leading else None

    @property
    def failures(self) -> tuple[MacpipeError, ...]:
        """Why those that ``find_leader`` asked last did not answer, in the order in which they were asked."""
        return tuple(self._failures.values())

    def _is_me(self, name: CoordinatorName) -> bool:
        return name.instance == self.me.instance


def _read(file: Path | None) -> dict[tuple[str, str], CoordinatorName]:
    """Return the coordinators in the file, by their keys. A file that is missing or damaged names none."""
    try:
        content = read_json(file, _MAX_FILE_BYTES) if file else []
        found = [CoordinatorName(str(one["name"]), "", tuple(map(str, one["addresses"]))) for one in content]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {_key(one): one for one in found[-MAX_COORDINATORS:] if one.addresses}


def _bounded(one: CoordinatorName) -> CoordinatorName:
    """Return a name as it is kept: what it claims of itself may be of any length."""
    return CoordinatorName(one.name[:MAX_FACT_CHARS], "", one.addresses[:MAX_ADDRESSES])


def _describe_away(heard: _Heard, silent_s: float) -> StandbyState:
    """Return the state of a coordinator that neither leads nor follows."""
    name, addresses = heard.name.name, heard.name.addresses
    if silent_s > _SILENT_S:
        return StandbyState(name, addresses, problem="it does not answer", away=True, silent_seconds=silent_s)
    return StandbyState(name, addresses, problem=heard.problem or "it has not begun to follow", away=True)


def _key(one: CoordinatorName) -> tuple[str, str]:
    """Return what tells a coordinator from others across restarts: two Macs may have one name."""
    return one.name, one.addresses[0]


def _write(file: Path, known: Iterable[CoordinatorName]) -> None:
    try:
        write_json(file, [{"name": one.name, "addresses": list(one.addresses)} for one in known])
    except OSError as e:
        log.warning("coordinators: not remembered for the next start reason=%s file=%s", e.strerror, file)
