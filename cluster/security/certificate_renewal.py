"""Renew certificates long before they expire: the holder asks with a new key, and the authority signs it.

The module has both sides. It knows nothing of the RPCs between them.
"""

from __future__ import annotations

from threading import Lock

from cluster.core.errors import Busy, InvalidRequest, MemberNotFound
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request, read_certificate
from cluster.security.limits import MAX_LEAVES_VALID, RENEWAL_SHARE
from cluster.security.members import Members
from cluster.security.roles import Role


def due_at(begins: float, ends: float) -> float:
    """Return when to renew a certificate that is valid between these times, in seconds since the epoch."""
    return begins + RENEWAL_SHARE * (ends - begins)


def is_due(begins: float, ends: float, now: float) -> bool:
    """Return whether a certificate that is valid between these times (seconds since the epoch) should be renewed."""
    return now > due_at(begins, ends)


class Renewal:
    """The holder's side. A new key stays in memory until there is a certificate for it."""

    def __init__(self, folder: ClusterFolder, role: Role, worker: str) -> None:
        self.folder, self._role, self._worker = folder, role, worker
        self._lock = Lock()
        self._key: bytes | None = None

    def held(self) -> Keyring:
        """Return the keyring on disk. Raises ``MemberNotFound`` if it is gone."""
        found = self.folder.keyring(self._role, self._worker)
        if found is None:
            raise MemberNotFound(
                f"this Mac is no longer a {self._role} of the cluster {self.folder.cluster}; join it again"
            )
        return found

    def request(self) -> bytes:
        """Return a request (PEM) to certify a new key: the same request until its certificate is installed."""
        with self._lock:
            self._key, request = make_request(self._key)
            return request

    def install(self, certificate: bytes) -> None:
        """Replace the old certificate with the one (PEM) that was requested. Raises ``InvalidRequest``.

        Another process of this machine may renew the same certificate: the folder's lock keeps each key beside its own
        certificate. Raises ``Busy`` if another process holds it too long.
        """
        with self._lock, self.folder.lock():
            held = self.held()
            try:
                fresh = Keyring.of(held.authority, certificate, self._key or b"")
            except ValueError as e:
                raise InvalidRequest(f"this is not the certificate that was requested: {e}") from e
            if (fresh.party.role, fresh.party.id) != (held.party.role, held.party.id):
                raise InvalidRequest(
                    f"the new certificate is for {fresh.party.role} {fresh.party.id}, but this machine is"
                    f" {held.party.role} {held.party.id}"
                )
            self.folder.keep(self._role, self._worker, key=self._key or b"", certificate=certificate)
            self._key = None


def renew_certificate(folder: ClusterFolder, role: Role, id: str, request: bytes, now: float) -> bytes:  # noqa: A002
    """Return a new certificate (PEM) for a member. The roster says who it is; the request says only its new key.

    Raises ``MemberNotFound``, ``InvalidRequest`` for an invalid request, and ``Busy`` if the member has many valid
    certificates already: each of them must be remembered, in case it has to be revoked.
    """
    members = Members(folder)
    member = next((m for m in members.current() if (m.role, m.id) == (role, id)), None)
    if member is None:
        raise MemberNotFound(f"the {role} {id} is not a member of this cluster; join again with a new token")
    valid = [one for one in member.issued if one.not_after > now]
    if len(valid) >= MAX_LEAVES_VALID:
        raise Busy(f"{member.name} already has {len(valid)} valid certificates; try again when one of them has expired")
    authority = Authority.load(folder)
    certificate = authority.sign(request, member.role, member.id, member.name, now)
    members.renew(*read_certificate(certificate))
    return certificate
