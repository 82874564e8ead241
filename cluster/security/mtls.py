"""Trust in a cluster: mutual TLS with the certificate that this machine holds as one of its parties."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from cryptography import x509

from cluster.core.errors import MacpipeError
from cluster.security.certificate_renewal import Renewal
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.keyring import Keyring
from cluster.security.limits import MAX_PARTIES_KNOWN, MAX_PEM_BYTES
from cluster.security.members import Members
from cluster.security.revocations import Revocations
from cluster.security.roles import Party, Role, party_of_certificate
from cluster.security.trust import AuthContext, ChannelOptions

log = logging.getLogger(__name__)


def open_cluster_trust(home: Path, cluster: str, roles: Sequence[str], name: str) -> ClusterTrust | None:
    """Open the trust of a machine that is in the cluster; None if it has none of the roles there."""
    folder = ClusterFolder(home, cluster)
    for role in map(Role, roles):
        if keyring := folder.keyring(role, name if role is Role.WORKER else ""):
            return ClusterTrust(folder, keyring, name)
    return None


class ClusterTrust:
    """Mutual TLS as the holder of ``keyring``. A renewed certificate in ``folder`` is used without a restart."""

    def __init__(
        self, folder: ClusterFolder, keyring: Keyring, worker: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self.folder, self._keyring, self._clock = folder, keyring, clock
        self._role, self._worker = keyring.party.role, worker
        self._certificate = folder.party(self._role, worker) / "certificate.pem"
        self._stamp = _stamp(self._certificate)
        self.members = Members(folder) if self._role is Role.COORDINATOR else None
        self.renewal = Renewal(folder, self._role, worker)
        self.revocations = Revocations(folder, worker) if self._role is Role.WORKER else None
        self._parties: dict[bytes, tuple[Party, float]] = {}

    @property
    def me(self) -> str:
        return f"{self._role}.{self._keyring.party.id}"

    @property
    def serial(self) -> int:
        return self.keyring.party.serial

    @property
    def validity(self) -> tuple[float, float]:
        return self.keyring.not_before, self.keyring.not_after

    @property
    def keyring(self) -> Keyring:
        """The current keyring of this process."""
        stamp = _stamp(self._certificate)
        if stamp != self._stamp:
            try:
                self._keyring = self.folder.keyring(self._role, self._worker) or self._keyring
            except MacpipeError as e:
                log.warning("certificates: keeping the old one reason=%s", e.sentence)
            self._stamp = stamp
        return self._keyring

    def server(self, host: str) -> grpc.ServerCredentials:
        given = self.keyring

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Return the configuration for a new connection; None if the certificate did not change.

            gRPC ends the process if handshakes time out whose configuration was replaced meanwhile, and any client
            could cause that. So the configuration is replaced only at a renewal.
            """
            nonlocal given
            own = self.keyring
            if own.certificate == given.certificate:
                return None
            given = own
            return _configuration(own)

        first = _configuration(given)
        return grpc.dynamic_ssl_server_credentials(first, renewed, require_client_authentication=True)  # type: ignore[arg-type]  # None is "as it is"

    def channel(self, host: str, peer: str) -> tuple[grpc.ChannelCredentials, ChannelOptions]:
        own = self.keyring
        own.check_clock(self._clock())
        credentials = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
        return credentials, [("grpc.ssl_target_name_override", f"{peer}.{own.party.cluster_id}")]

    def party(self, shown: AuthContext) -> Party | None:
        pem = next(iter(shown.get("x509_pem_cert", ())), b"")
        known = self._parties.get(pem) or self._read(pem)
        if known is None or known[1] < self._clock():  # a connection may outlive its certificate
            return None
        return known[0]

    def _read(self, pem: bytes) -> tuple[Party, float] | None:
        """Return the party of a certificate that TLS has verified, and when it expires."""
        if not pem or len(pem) > MAX_PEM_BYTES:
            return None
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            party = party_of_certificate(certificate)
        except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
            return None
        if party.cluster_id != self._keyring.party.cluster_id:
            return None
        if len(self._parties) >= MAX_PARTIES_KNOWN:
            self._parties.clear()
        known = self._parties[pem] = party, certificate.not_valid_after_utc.timestamp()
        return known

    def revoked(self, serial: int) -> bool:
        if self.revocations:
            return serial in self.revocations.known()
        return self.members is not None and serial in self.members.revoked()


def _stamp(path: Path) -> Stamp | None:
    try:
        return file_version(path)
    except OSError:
        return None


def _configuration(own: Keyring) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(own.key, own.certificate)], own.authority)
