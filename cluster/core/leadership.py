"""Who leads a cluster, and which coordinators stand by to take its place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CoordinatorRole(StrEnum):
    """What a coordinator does: it serves, or it keeps a replica of the one that does."""

    LEADER = "leader"
    STANDBY = "standby"
    UNKNOWN = "unknown"
    """A role that this client's version does not know."""


class Replicate(StrEnum):
    """When a token may leave: once every standby in sync has its record, or at once."""

    SYNC = "sync"
    ASYNC = "async"


@dataclass(frozen=True, slots=True)
class CoordinatorName:
    """A coordinator as others know it: its Mac's name, its process, its gRPC addresses and HTTP URLs, best first."""

    name: str
    instance: str
    addresses: tuple[str, ...] = ()
    http: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StandbyState:
    """A standby of the leader. ``behind`` is how many updates it has not stored yet.

    One in sync has every record that left; only it may resume answers. ``problem`` says why it is not; "" if it is.
    ``away``: it does not follow now, although it did, or led, or said that it stands by. ``silent_seconds`` is how long
    it has not answered then; 0 if it does.
    """

    name: str
    addresses: tuple[str, ...] = ()
    in_sync: bool = False
    behind: int = 0
    problem: str = ""
    away: bool = False
    silent_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LeadershipState:
    """Who leads, as the coordinator that was asked knows it.

    ``role`` is its own. ``leader`` is None while nobody leads. ``since_seconds`` is how long ago the term began.
    ``replicate`` is None if no journal is replicated. ``others`` are further leaders of the same cluster, as on the
    other side of a cut.
    """

    role: CoordinatorRole
    term: int = 0
    leader: CoordinatorName | None = None
    since_seconds: float = 0.0
    replicate: Replicate | None = None
    standbys: tuple[StandbyState, ...] = ()
    others: tuple[CoordinatorName, ...] = ()


@dataclass(frozen=True, slots=True)
class FollowingState:
    """What a standby knows of itself: the highest term, and the leader, None while nobody is known to lead.

    ``follows``: it gets what the leader does. ``in_sync``: by the leader's last word, it has every record that left.
    """

    term: int = 0
    leader: CoordinatorName | None = None
    follows: bool = False
    in_sync: bool = False


@dataclass(frozen=True, slots=True)
class LeaderClaim:
    """What one coordinator tells another: what it is, and who leads as far as it knows.

    ``term`` is that by which it leads, or the one of its leader; 0 if there is none. ``leader`` is itself if it leads.
    ``problem`` says why it neither leads nor follows; "" if nothing is wrong.
    """

    coordinator: CoordinatorName
    role: CoordinatorRole
    term: int = 0
    leader: CoordinatorName | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoredEdit:
    """Which standbys of a leader have stored an edit of its state, and which have not."""

    stored: tuple[StandbyState, ...] = ()
    missing: tuple[StandbyState, ...] = ()
