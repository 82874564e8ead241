"""The roster of a cluster: its members, their certificates, and who was removed.

It is kept on the machines of coordinators. It signs nothing; it says who may get a certificate and whose are revoked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.errors import Busy, DuplicateName, InvalidOption, MemberNotFound, NoCluster
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import MAX_MEMBERS, MAX_SERIALS
from cluster.security.name_check import check_name
from cluster.security.roles import Party, Role
from cluster.security.state_file import StateFile


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate of a member: its serial, and when it expires (seconds since the epoch)."""

    serial: int
    not_after: float


@dataclass(frozen=True, slots=True)
class Member:
    """A member, admitted at ``since``. ``removed`` is the time of its removal, None while it belongs.

    ``authority``: the authority's key was moved to this coordinator's machine.
    """

    id: str
    role: Role
    name: str
    since: float
    issued: tuple[Issued, ...] = ()
    removed: float | None = None
    authority: bool = False


class Members:
    """The roster in ``folder``. Other processes may edit it."""

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self._file = StateFile(folder, folder.members, _pack, _unpack)

    def all_members(self) -> tuple[Member, ...]:
        """Return all members in order of admission, removed ones until their certificates expire."""
        return self._file.rows()

    def current(self) -> tuple[Member, ...]:
        """Return the members that were not removed."""
        return tuple(member for member in self.all_members() if member.removed is None)

    def authority_holder(self) -> Member | None:
        """Return the coordinator on whose machine the authority's key is; None if the roster has no coordinator."""
        return _authority_holder(self.all_members())

    def first_end(self) -> float | None:
        """Return when the first current member's certificate expires unless it is renewed; None without members.

        Those that have expired are left out: their holders have left, or must join again in any case.
        """
        now = self._clock()
        ends = (max((one.not_after for one in member.issued), default=0.0) for member in self.current())
        return min((end for end in ends if end > now), default=None)

    def revoked(self) -> frozenset[int]:
        """Return the serials of removed members' certificates that have not expired."""
        now = self._clock()
        gone = (member for member in self.all_members() if member.removed is not None)
        return frozenset(one.serial for member in gone for one in member.issued if one.not_after > now)

    def admits(self, party: Party) -> bool:
        """Return whether ``party`` is a current member with this certificate."""
        return any(
            member.id == party.id and member.role is party.role and one.serial == party.serial
            for member in self.current()
            for one in member.issued
        )

    def check_room(self, role: Role, id: str, name: str) -> None:  # noqa: A002
        """Raise ``DuplicateName`` if the name or id is taken, ``Busy`` if the roster is full."""
        _check_room(self._drop_expired(self.all_members()), role, id, check_name(name, "a member's"))

    def admit(self, party: Party, not_after: float, *, locked: bool = False) -> None:
        """Add a member with its first certificate; the same certificate again changes nothing.

        Raises as ``check_room`` does. ``locked`` says that the caller holds the folder's lock.
        """
        with self._file.edit(locked=locked) as edit:
            rows = self._drop_expired(edit.rows)
            if any(one.serial == party.serial for member in rows for one in member.issued):
                return
            _check_room(rows, party.role, party.id, party.name)
            issued = (Issued(party.serial, not_after),)
            edit.rows = (*rows, Member(party.id, party.role, party.name, self._clock(), issued))

    def renew(self, party: Party, not_after: float) -> None:
        """Add a further certificate of a member. Raises ``MemberNotFound`` if it no longer belongs."""
        with self._file.edit() as edit:
            rows = self._drop_expired(edit.rows)
            at = _position(rows, lambda m: m.removed is None and (m.id, m.role) == (party.id, party.role))
            if at is None:
                raise MemberNotFound(f"{party.name} is not a member of this cluster; `macpipe members` shows who is")
            now = self._clock()
            valid = [one for one in rows[at].issued if one.not_after > now][-MAX_SERIALS + 1 :]
            fresh = replace(rows[at], issued=(*valid, Issued(party.serial, not_after)))
            edit.rows = (*rows[:at], fresh, *rows[at + 1 :])

    def remove(self, name: str) -> Member:
        """Remove the member ``name``, revoke its certificates and return it.

        Raises ``MemberNotFound``, and ``InvalidOption`` for this Mac's coordinator and the authority's.
        """
        with self._file.edit() as edit:
            rows = self._drop_expired(edit.rows)
            at = _position(rows, lambda m: m.removed is None and m.name == name)
            if at is None:
                raise MemberNotFound(f"no member of this cluster is named {name}; `macpipe members` shows them")
            self._require_removable(rows, rows[at])
            gone = replace(rows[at], removed=self._clock())
            edit.rows = (*rows[:at], gone, *rows[at + 1 :])
            return gone

    def merge(self, content: bytes) -> None:
        """Take over what another machine's roster has beyond this one. Who was removed in one of them stays removed.

        Where the authority's key is, the other roster decides. Raises ``ClusterDamaged``, and as an edit does.
        """
        theirs = self._file.parse(content)
        with self._file.edit() as edit:
            merged = {_key(member): member for member in edit.rows}
            for member in theirs:
                own = merged.get(_key(member))
                merged[_key(member)] = _merge(own, member) if own else member
            kept = self._drop_expired(tuple(sorted(merged.values(), key=lambda member: member.since)))
            edit.rows = kept[:MAX_MEMBERS]

    def name_authority_holder(self, id: str, *, locked: bool = False) -> None:  # noqa: A002
        """Record that the authority is on the machine of the coordinator ``id``. Raises ``MemberNotFound``.

        ``locked`` says that the caller holds the folder's lock.
        """
        with self._file.edit(locked=locked) as edit:
            at = _position(edit.rows, lambda m: m.removed is None and (m.role, m.id) == (Role.COORDINATOR, id))
            if at is None:
                raise MemberNotFound(
                    f"no coordinator of this cluster has the id {id[:32]}; `macpipe members` shows them"
                )
            edit.rows = tuple(replace(m, authority=i == at) for i, m in enumerate(edit.rows))

    def _require_removable(self, rows: tuple[Member, ...], member: Member) -> None:
        if member.role is not Role.COORDINATOR:
            return
        if member == _authority_holder(rows):
            raise InvalidOption(
                f"{member.name} holds the cluster's authority, and cannot be removed; move that to another coordinator"
                " first, with `macpipe authority move NAME` on its Mac"
            )
        own = self._folder.keyring(Role.COORDINATOR)
        if own is not None and own.party.id == member.id:
            raise InvalidOption(f"{member.name} is this Mac's own coordinator; remove it on another coordinator's Mac")

    def _drop_expired(self, rows: tuple[Member, ...]) -> tuple[Member, ...]:
        """Drop members whose last certificate has expired: they cannot connect, and may join again by the same name.

        The coordinator that holds the authority stays, since it certifies itself.
        """
        now, holder = self._clock(), _authority_holder(rows)
        return tuple(m for m in rows if m is holder or any(one.not_after > now for one in m.issued))


def _key(member: Member) -> tuple[Role, str, float]:
    return member.role, member.id, member.since


def _merge(own: Member, other: Member) -> Member:
    serials = {one.serial: one for one in (*own.issued, *other.issued)}
    issued = sorted(serials.values(), key=lambda one: one.not_after)[-MAX_SERIALS:]
    removed = [at for at in (own.removed, other.removed) if at is not None]
    return replace(other, issued=tuple(issued), removed=min(removed, default=None))


def _authority_holder(rows: tuple[Member, ...]) -> Member | None:
    """Return the coordinator to which the authority was moved, else the first one, which made the cluster."""
    coordinators = [m for m in rows if m.role is Role.COORDINATOR and m.removed is None]
    return next((m for m in coordinators if m.authority), coordinators[0] if coordinators else None)


def require_roster(members: Members | None, cluster: str) -> None:
    """Raise ``NoCluster`` if a coordinator has no copy of its cluster's roster.

    It would refuse every worker, and could not tell them which certificates are revoked. None: no cluster.
    """
    if members is not None and members.authority_holder() is None:
        raise NoCluster(
            f"this Mac's coordinator has no list of the members of cluster {cluster} yet; serve on the Mac that"
            " made the cluster"
        )


def _check_room(rows: tuple[Member, ...], role: Role, id: str, name: str) -> None:  # noqa: A002
    for member in rows:
        if member.removed is None and member.name == name:
            raise DuplicateName(
                f"the cluster has a member named {name} ({member.role}); join with another --name, or run"
                f" `macpipe remove {name}` on the coordinator's Mac first"
            )
        if member.removed is None and (member.id, member.role) == (id, role):
            raise DuplicateName(
                f"this {role} is already a member, as {member.name}; run `macpipe remove {member.name}` on the"
                " coordinator's Mac, and join again"
            )
    if len(rows) >= MAX_MEMBERS:
        raise Busy(f"the cluster has {MAX_MEMBERS} members, removed ones included, and cannot keep more")


def _position(rows: tuple[Member, ...], fits: Callable[[Member], bool]) -> int | None:
    return next((at for at, member in enumerate(rows) if fits(member)), None)


def _pack(member: Member) -> dict[str, Any]:
    return {
        "id": member.id,
        "role": member.role.value,
        "name": member.name,
        "since": member.since,
        "issued": [[f"{one.serial:x}", one.not_after] for one in member.issued],
        "removed": member.removed,
    } | ({"authority": True} if member.authority else {})


def _unpack(
    id: str,  # noqa: A002
    role: str,
    name: str,
    since: float,
    issued: list[Any],
    removed: float | None,
    authority: bool = False,
) -> Member:
    known = tuple(Issued(int(serial, 16), float(ends)) for serial, ends in issued)
    gone = None if removed is None else float(removed)
    return Member(str(id), Role(role), str(name), float(since), known, gone, authority is True)
