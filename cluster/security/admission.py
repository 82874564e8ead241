"""Admit members: redeem a join token for a certificate, once, and certify the first machine.

The module decides and writes under the folder's lock. It knows nothing of the network.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.errors import ClockWrong, TokenRefused
from cluster.security.authority import Authority, read_request_key
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request, public_bytes, read_certificate
from cluster.security.limits import BACKDATED_S, LEAF_S
from cluster.security.members import Members
from cluster.security.roles import Party, Role
from cluster.security.tokens import TokenStore


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A join request. ``clock`` is the joining Mac's time, in seconds since the epoch."""

    token: str
    secret: bytes
    csr: bytes
    id: str
    name: str
    clock: float


class Admission:
    """Admits members to the cluster in ``folder``, on the machine that holds the authority's key.

    Raises ``NoCluster`` or ``ClusterDamaged`` if the authority cannot be used. Every method may wait for the disk.
    """

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self.authority = Authority.load(folder)
        self.tokens = TokenStore(folder, clock)
        self.members = Members(folder, clock)

    def admit(self, request: AdmissionRequest) -> bytes:
        """Return a certificate (PEM) for a token and a request; the same request again gets the same certificate.

        Raises ``TokenRefused``. Every other error leaves the token unused: ``InvalidRequest``, ``DuplicateName``,
        ``ClockWrong``, ``Busy``.
        """
        key = hashlib.sha256(public_bytes(read_request_key(request.csr))).digest()
        with self._folder.lock():
            token = self.tokens.accept(request.token, request.secret, key)
            now = self._clock()
            if token.used is not None:
                return self._repeat_admission(token.certificate)
            check_clocks(request.clock, now)
            self.members.check_room(token.role, request.id, request.name)
            certificate = self.authority.sign(request.csr, token.role, request.id, request.name, now)
            # The token is spent before the member is added: a crash between the two must not let a second Mac in.
            self.tokens.spend(token, key, request.name, certificate)
            self._add_member(certificate)
            return certificate

    def certify_own(self, role: Role, id: str, name: str) -> Party:  # noqa: A002
        """Make this machine a party as ``role``: write its key and certificate and add it to the roster.

        Raises ``DuplicateName`` if it is one already.
        """
        key, csr = make_request()
        with self._folder.lock():
            certificate = self.authority.sign(csr, role, id, name, self._clock())
            party = self._add_member(certificate)
            self._folder.keep(role, name, key=key, certificate=certificate)
        return party

    def _repeat_admission(self, certificate: bytes) -> bytes:
        """Answer a Mac that lost the first answer. It may have been removed since, or not yet be in the roster."""
        party, _ = read_certificate(certificate)
        if party.serial in self.members.revoked():
            raise TokenRefused(
                f"{party.name} was removed from the cluster; ask for a new token: `macpipe token create` on the"
                " coordinator's Mac"
            )
        self._add_member(certificate)
        return certificate

    def _add_member(self, certificate: bytes) -> Party:
        party, ends = read_certificate(certificate)
        self.members.admit(party, ends, locked=True)
        return party


def check_clocks(theirs: float, ours: float) -> None:
    """Raise ``ClockWrong`` if a certificate that starts a day before ``ours`` is not valid at ``theirs``."""
    if not -BACKDATED_S < theirs - ours < LEAF_S:
        raise ClockWrong(
            f"this Mac's clock is {clocks_in_words(theirs - ours)} the coordinator's, so a certificate would not be"
            " valid here; set the clock and join again with the same token"
        )


def clocks_in_words(ahead_s: float) -> str:
    """Describe a difference between clocks: ``10 min ahead of``, ``2 days behind``."""
    size = abs(ahead_s)
    units = ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    seconds, unit = next((one for one in units if size >= 2 * one[0]), units[-1])
    return f"{size / seconds:.0f} {unit} {'ahead of' if ahead_s > 0 else 'behind'}"
