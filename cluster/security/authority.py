"""The cluster's certificate authority: an EC P-256 key on the coordinator's machine that signs certificates.

It takes only the public key from a request. Role, id and name come from the caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.core.errors import AuthorityElsewhere, ClusterDamaged, InvalidOption, InvalidRequest, NoCluster
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import date_in_words, private_bytes, public_bytes
from cluster.security.limits import AUTHORITY_S, BACKDATED_S, LEAF_S, MAX_PEM_BYTES
from cluster.security.members import Members
from cluster.security.name_check import check_name
from cluster.security.roles import ID, Role, name_of

_BOTH: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_COMMON_NAME_CHARS: Final = 64
_ORGANIZATION: Final = "macpipe"


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's certificate (PEM) and key. ``fingerprint`` is what join tokens pin."""

    certificate: bytes
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def make(cls, folder: ClusterFolder, now: float) -> Authority:
        """Create an authority and write it to ``folder``. Raises ``InvalidOption`` if the folder has one."""
        if folder.exists:
            raise InvalidOption(
                f"this Mac is already in a cluster named {folder.cluster}; choose another name with --cluster NAME, or"
                f" remove {folder.path}"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION),
                x509.NameAttribute(NameOID.COMMON_NAME, folder.cluster),
            ]
        )
        certificate = (
            _certificate_builder(subject, subject, key.public_key(), now, now + AUTHORITY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .sign(key, SHA256())
        )
        made = cls(certificate.public_bytes(Encoding.PEM), key)
        folder.write(folder.authority_key, private_bytes(key))
        folder.write(folder.authority, made.certificate)
        return made

    @classmethod
    def load(cls, folder: ClusterFolder) -> Authority:
        """Read the authority of ``folder``.

        Raises ``NoCluster`` if this machine is in no cluster of that name, and ``AuthorityElsewhere`` if the authority
        is on another machine.
        """
        if not folder.exists:
            raise NoCluster(
                f"this Mac does not lead a cluster named {folder.cluster}: create one with `macpipe init`, or run this"
                " command on the Mac that did"
            )
        holder = find_holder(folder)
        if not holder.here:
            raise AuthorityElsewhere(f"{holder.problem(folder.cluster)}; run this command there", holder=holder.name)
        try:
            certificate, key = folder.authority.read_bytes(), folder.authority_key.read_bytes()
            private = load_pem_private_key(key, None)
            if not isinstance(private, ec.EllipticCurvePrivateKey):
                raise ValueError("not an EC key")
            own = x509.load_pem_x509_certificate(certificate)
            if public_bytes(own.public_key()) != public_bytes(private.public_key()):
                raise ValueError("the key belongs to another authority")
        except (OSError, ValueError, TypeError) as e:
            raise ClusterDamaged(
                f"the authority in {folder.path} cannot be used: {e}; put back a copy of its files"
            ) from e
        return cls(certificate, private)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the authority's public key (SubjectPublicKeyInfo)."""
        return hashlib.sha256(public_bytes(self._key.public_key())).digest()

    @property
    def cluster_id(self) -> str:
        return cluster_id_of(self.fingerprint)

    def sign(self, csr_pem: bytes, role: Role, id: str, name: str, now: float) -> bytes:  # noqa: A002
        """Return a party's certificate (PEM) for the public key of a request. Raises ``InvalidRequest``."""
        if not ID.fullmatch(id):
            raise InvalidRequest(f"{id[:32]!r} is not an id: an id has 16 hex digits", field="id")
        check_name(name, "a member's")
        hosts = [x509.DNSName(name_of(role, self.cluster_id, id)), x509.DNSName(name_of(role, self.cluster_id))]
        return self._leaf(read_request_key(csr_pem), name, hosts, _BOTH, now)

    def sign_http(self, csr_pem: bytes, hosts: Sequence[str], now: float) -> bytes:
        """Return a certificate (PEM) for an HTTPS port that clients reach at these host names and addresses.

        It names no role, so no gRPC server accepts it as a party's. Raises ``InvalidRequest``.
        """
        names = [_general_name(host) for host in hosts]
        if not names or any(host.endswith(f".{self.cluster_id}") for host in hosts):
            raise InvalidRequest("a certificate for HTTP needs the host names of this Mac", field="hosts")
        return self._leaf(read_request_key(csr_pem), hosts[0], names, (ExtendedKeyUsageOID.SERVER_AUTH,), now)

    def _leaf(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        now: float,
    ) -> bytes:
        own = x509.load_pem_x509_certificate(self.certificate)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_COMMON_NAME_CHARS])])
        ends = min(now + LEAF_S, own.not_valid_after_utc.timestamp())
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        leaf = (
            _certificate_builder(subject, own.subject, key, now, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
            .add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(self._key, SHA256())
        )
        return leaf.public_bytes(Encoding.PEM)


@dataclass(frozen=True, slots=True)
class AuthorityHolder:
    """Where the authority is: ``name`` is its coordinator's, "" if this machine's roster does not say.

    ``first_end`` is when the first certificate expires that only the authority can renew, in seconds since the epoch.
    """

    here: bool
    name: str = ""
    first_end: float | None = None

    @property
    def place(self) -> str:
        """The Mac where it is, in words."""
        return f"the Mac of {self.name}" if self.name else "the coordinator's Mac"

    def problem(self, cluster: str) -> str:
        """Say what cannot be done where the authority is not, and how long all goes on without it."""
        ends = f"; the first certificate ends {date_in_words(self.first_end)}" if self.first_end else ""
        return (
            f"the authority of cluster {cluster} is on {self.place}: Macs join and API keys are managed there alone,"
            f" and no certificate is renewed while no coordinator answers there{ends}"
        )


def find_holder(folder: ClusterFolder, members: Members | None = None) -> AuthorityHolder:
    """Return where the authority of the cluster in ``folder`` is, as far as this machine knows.

    ``members`` is its roster, if the caller has one that is already read.
    """
    members = members or Members(folder)
    named = members.authority_holder()
    own = folder.keyring(Role.COORDINATOR)
    moved = named is not None and own is not None and own.party.id != named.id
    here = folder.holds_authority and not moved
    return AuthorityHolder(here, named.name if named else "", members.first_end())


def cluster_id_of(fingerprint: bytes) -> str:
    """Return the cluster's id: the first 16 hex digits of its authority's fingerprint."""
    return fingerprint.hex()[:16]


@dataclass(frozen=True, slots=True)
class PresentedAuthority:
    """An authority that another machine presented: certificate (PEM), fingerprint and the name of its cluster."""

    certificate: bytes
    fingerprint: bytes
    cluster: str

    @property
    def cluster_id(self) -> str:
        return cluster_id_of(self.fingerprint)


_UNFIT: Final = (
    *(InvalidSignature, InvalidOption, UnsupportedAlgorithm, ValueError, TypeError),
    *(x509.ExtensionNotFound, x509.DuplicateExtension),
)
"""What reading an untrusted certificate may raise."""


def read_authority(pem: bytes) -> PresentedAuthority:
    """Read an untrusted authority's certificate. Raises ``ValueError``.

    The result holds one self-signed certificate, encoded again, so that nothing else of the input is kept.
    """
    if len(pem) > MAX_PEM_BYTES:
        raise ValueError("too long for a certificate")
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        cluster = check_name(str(name.value), "a cluster's")
        fingerprint = hashlib.sha256(public_bytes(certificate.public_key())).digest()
    except _UNFIT:
        raise ValueError("the certificate is not that of a macpipe authority") from None
    if not constraints.ca:
        raise ValueError("the certificate is not that of a macpipe authority")
    return PresentedAuthority(certificate.public_bytes(Encoding.PEM), fingerprint, cluster)


def read_request_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public key of a request (PEM). Its signature proves that the sender holds the private key.

    Raises ``InvalidRequest``.
    """
    try:
        if len(csr_pem) > MAX_PEM_BYTES:
            raise ValueError("it is too long")
        csr = x509.load_pem_x509_csr(csr_pem)
        public_bytes(csr.public_key())
        if not csr.is_signature_valid:
            raise ValueError("its signature is wrong")
    except Exception as e:  # untrusted bytes: cryptography raises errors of many kinds
        raise InvalidRequest(f"this is not a certificate request for an EC P-256 key: {e}"[:200], field="csr") from e
    key = csr.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, ends: float
) -> x509.CertificateBuilder:
    """Build what every certificate has: names, key, random serial, and a validity that starts a day ago."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now - BACKDATED_S, UTC))
        .not_valid_after(datetime.fromtimestamp(ends, UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    """Allow a certificate to sign either certificates or handshakes, and nothing else."""
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as e:
        raise InvalidRequest(f"{host[:64]!r} is not a host name", field="hosts") from e
