"""Certificates are renewed by themselves, long before they end: who holds one asks with a new key, the authority signs.

Both sides are here; who talks to whom over which RPC is for others to know.
"""

from __future__ import annotations

from threading import Lock

from cluster.core.errors import Busy, InvalidRequest, MemberNotFound
from cluster.security.authority import Authority
from cluster.security.bounds import MAX_LEAVES_VALID, RENEWAL_SHARE
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request, read_certificate
from cluster.security.members import Members
from cluster.security.roles import Role


def is_due(begins: float, ends: float, now: float) -> bool:
    """Whether a certificate that is valid between these times (seconds since the epoch) should be renewed."""
    return now > begins + RENEWAL_SHARE * (ends - begins)


class Renewal:
    """The holder's side. The new key is in memory alone until there is a certificate for it."""

    def __init__(self, folder: ClusterFolder, role: Role, worker: str) -> None:
        self.folder, self._role, self._worker = folder, role, worker
        self._lock = Lock()
        self._key: bytes | None = None

    def held(self) -> Keyring:
        """What is on the disk now. Raises ``MemberNotFound`` where that is nothing any more."""
        found = self.folder.keyring(self._role, self._worker)
        if found is None:
            raise MemberNotFound(f"this machine is no {self._role} of {self.folder.cluster} any more")
        return found

    def request(self) -> bytes:
        """A request (PEM) to certify a new key; the same one until its certificate has come."""
        with self._lock:
            self._key, request = make_request(self._key)
            return request

    def install(self, certificate: bytes) -> None:
        """Keep the certificate (PEM) that was asked for, in place of the old one. Raises ``InvalidRequest``."""
        with self._lock:
            held = self.held()
            try:
                fresh = Keyring.of(held.authority, certificate, self._key or b"")
            except ValueError as e:
                raise InvalidRequest(f"this is not the certificate that was asked for: {e}") from e
            if (fresh.party.role, fresh.party.id) != (held.party.role, held.party.id):
                raise InvalidRequest("this is another party's certificate")
            self.folder.keep(self._role, self._worker, key=self._key or b"", certificate=certificate)
            self._key = None


def renew_certificate(folder: ClusterFolder, role: Role, id: str, request: bytes, now: float) -> bytes:  # noqa: A002
    """A further certificate (PEM) for a member: who it is the roster says, and the request only with which key.

    Raises ``MemberNotFound``, ``InvalidRequest`` for a request that is none, and ``Busy`` where it has many
    certificates already: each must be remembered, to be revoked one day.
    """
    members = Members(folder)
    member = next((m for m in members.current() if (m.role, m.id) == (role, id)), None)
    if member is None:
        raise MemberNotFound(f"the {role} {id} is not a member of this cluster")
    valid = [one for one in member.issued if one.not_after > now]
    if len(valid) >= MAX_LEAVES_VALID:
        raise Busy(f"{member.name} has {len(valid)} certificates that are valid still")
    authority = Authority.load(folder)
    certificate = authority.sign(request, member.role, member.id, member.name, now)
    members.renew(*read_certificate(certificate))
    return certificate
