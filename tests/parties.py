"""Clusters for tests: an authority and admitted parties of any role, in folders as ``init`` and ``join`` leave them."""

from __future__ import annotations

import os
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from cluster.coordinator.identity import hold_identity as hold_coordinator_identity
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request
from cluster.security.members import Members
from cluster.security.mtls import ClusterTrust
from cluster.security.roles import Party, Role
from cluster.worker.identity import hold_identity as hold_worker_identity


def mtls() -> bool:
    """Whether the tests' clusters have certificates: ``--mtls`` was given."""
    return os.environ.get("MACPIPE_TEST_MTLS") == "1"


@dataclass(frozen=True)
class Lead:
    """The machine that admits others: ``folder`` holds the authority and the roster."""

    folder: ClusterFolder
    authority: Authority

    @classmethod
    def make(cls, home: Path, cluster: str = "default") -> Lead:
        folder = ClusterFolder(home, cluster)
        return cls(folder, Authority.make(folder, time.time()))

    @classmethod
    def like(cls, other: Lead, home: Path, cluster: str) -> Lead:
        """Return the same authority with its own roster, under another home and name."""
        folder = ClusterFolder(home, cluster)
        for path, copy in (
            (other.folder.authority, folder.authority),
            (other.folder.authority_key, folder.authority_key),
        ):
            folder.write(copy, path.read_bytes())
        return cls(folder, other.authority)

    @property
    def members(self) -> Members:
        return Members(self.folder)

    def admit(self, role: Role, name: str, id: str, home: Path | None = None, now: float | None = None) -> Party:  # noqa: A002
        """Give a party its files under ``home`` (else this machine's), and enter it in the roster."""
        key, request = make_request()
        certificate = self.authority.sign(request, role, id, name, time.time() if now is None else now)
        folder = ClusterFolder(home or self.folder.home, self.folder.cluster)
        folder.write(folder.authority, self.authority.certificate)
        folder.keep(role, name, key=key, certificate=certificate)
        keyring = Keyring.of(self.authority.certificate, certificate, key)
        self.members.admit(keyring.party, keyring.not_after)
        return keyring.party

    def admit_worker(self, name: str, home: Path, now: float | None = None) -> Party:
        """With the id that the worker has, or will have, under ``home``."""
        with hold_worker_identity(home, name) as own_id:
            return self.admit(Role.WORKER, name, own_id, home, now)

    def admit_coordinator(self, name: str = "lead", now: float | None = None) -> Party:
        with hold_coordinator_identity(self.folder.home, self.folder.cluster) as own_id:
            return self.admit(Role.COORDINATOR, name, own_id, now=now)

    def trust(self, role: Role, name: str = "", home: Path | None = None) -> ClusterTrust:
        """Return the trust of a process of that role, admitted before."""
        folder = ClusterFolder(home or self.folder.home, self.folder.cluster)
        keyring = folder.keyring(role, name)
        assert keyring
        return ClusterTrust(folder, keyring, name if role is Role.WORKER else "")


def shared_lead() -> Lead:
    """The authority of every cluster of this run with ``--mtls``; this process is an admin of all of them."""
    home = Path(os.environ["MACPIPE_HOME"])
    folder = ClusterFolder(home, "default")
    if folder.exists:
        return Lead(folder, Authority.load(folder))
    made = Lead.make(home)
    made.admit(Role.ADMIN, "tests", "ad" * 8)
    return made


def shown_by(lead: Lead, address: str) -> int:
    """The serial of the certificate that a server shows."""
    own = lead.folder.party(Role.COORDINATOR)
    context = ssl.create_default_context(cafile=str(lead.folder.authority))
    context.load_cert_chain(own / "certificate.pem", own / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    name = f"worker.{lead.authority.cluster_id}"
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    assert der
    return x509.load_der_x509_certificate(der).serial_number
