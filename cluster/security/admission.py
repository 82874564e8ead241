"""Who comes in, and how: a token is redeemed for a certificate, once; the first machine certifies itself.

It decides and writes, under the folder's lock; it knows no network.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.errors import ClockWrong, TokenRefused
from cluster.security.authority import Authority, read_request_key
from cluster.security.bounds import BACKDATED_S, LEAF_S
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request, public_bytes, read_certificate
from cluster.security.members import Members
from cluster.security.roles import Party, Role
from cluster.security.tokens import TokenStore


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What a Mac says that wants to join. ``clock`` is its own, in seconds since the epoch."""

    token: str
    secret: bytes
    csr: bytes
    id: str
    name: str
    clock: float


class Admission:
    """The door of the cluster in ``folder``, on the machine that holds its authority.

    Raises ``NoCluster`` or ``ClusterDamaged`` where that cannot be used. Everything here may take as long as a disk.
    """

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self.authority = Authority.load(folder)
        self.tokens = TokenStore(folder, clock)
        self.members = Members(folder, clock)

    def admit(self, wish: AdmissionRequest) -> bytes:
        """The certificate (PEM) for a token and a request; the same request again gets the same one.

        A refusal other than ``TokenRefused`` leaves the token as it was: ``InvalidRequest``, ``DuplicateName``,
        ``ClockWrong``, ``Busy``.
        """
        key = hashlib.sha256(public_bytes(read_request_key(wish.csr))).digest()
        with self._folder.lock():
            token = self.tokens.accept(wish.token, wish.secret, key)
            now = self._clock()
            if token.used is not None:
                return self._again(token.certificate)
            check_clocks(wish.clock, now)
            self.members.check_room(token.role, wish.id, wish.name)
            certificate = self.authority.sign(wish.csr, token.role, wish.id, wish.name, now)
            # Spent before entered: a crash between the two must not let a second Mac in.
            self.tokens.spend(token, key, wish.name, certificate)
            self._enter(certificate)
            return certificate

    def certify_own(self, role: Role, id: str, name: str) -> Party:  # noqa: A002
        """Make this machine a party as ``role``: key, certificate, and its entry in the roster.

        Raises ``DuplicateName`` where it is one already.
        """
        key, csr = make_request()
        with self._folder.lock():
            certificate = self.authority.sign(csr, role, id, name, self._clock())
            party = self._enter(certificate)
            self._folder.keep(role, name, key=key, certificate=certificate)
        return party

    def _again(self, certificate: bytes) -> bytes:
        """A Mac that missed the answer asks once more; it may have been removed, or a crash may have come between."""
        party, _ = read_certificate(certificate)
        if party.serial in self.members.revoked():
            raise TokenRefused(
                f"{party.name} was removed from the cluster; ask for a new token: `macpipe token create` on the"
                " coordinator's Mac"
            )
        self._enter(certificate)
        return certificate

    def _enter(self, certificate: bytes) -> Party:
        party, ends = read_certificate(certificate)
        self.members.admit(party, ends, locked=True)
        return party


def check_clocks(theirs: float, ours: float) -> None:
    """Raise ``ClockWrong`` where a certificate that begins a day before ``ours`` is not valid by ``theirs``."""
    if not -BACKDATED_S < theirs - ours < LEAF_S:
        raise ClockWrong(
            f"this Mac's clock is {clocks_in_words(theirs - ours)} the coordinator's, so that no certificate would be"
            " valid here; set it, and join again with the same token"
        )


def clocks_in_words(ahead_s: float) -> str:
    """``10 min ahead of``, ``2 days behind``."""
    size = abs(ahead_s)
    units = ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    seconds, unit = next((one for one in units if size >= 2 * one[0]), units[-1])
    return f"{size / seconds:.0f} {unit} {'ahead of' if ahead_s > 0 else 'behind'}"
