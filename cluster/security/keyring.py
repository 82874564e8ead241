"""A party's keyring: the authority's certificate, its own certificate, and its key, which never leaves the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from cluster.core.errors import ClockWrong, ClusterDamaged, MacpipeError
from cluster.security.limits import MAX_PEM_BYTES
from cluster.security.roles import Party, party_of_certificate, read_party

_READ_ATTEMPTS: Final = 20
_READ_PAUSE_S: Final = 0.05
"""A renewal replaces two files, one after the other. A reader in between tries again, for a second in all."""


@dataclass(frozen=True, slots=True)
class Keyring:
    """PEM files of one party that belong together. Times are seconds since the epoch, UTC."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    party: Party
    not_before: float
    not_after: float

    @classmethod
    def load(cls, folder: Path, authority: Path) -> Keyring:
        """Read ``key.pem`` and ``certificate.pem`` of ``folder``, and the ``authority``'s certificate.

        Raises ``ClusterDamaged`` if one is missing or they do not belong together.
        """
        for attempt in range(_READ_ATTEMPTS):
            if attempt:
                time.sleep(_READ_PAUSE_S)
            try:
                files = (authority, folder / "certificate.pem", folder / "key.pem")
                return cls.of(*(_read(file) for file in files))
            except ValueError as e:
                why = e
        raise ClusterDamaged(
            f"the certificate in {folder} cannot be used ({why}); remove the folder and join again"
        ) from why

    @classmethod
    def of(cls, authority: bytes, certificate: bytes, key: bytes) -> Keyring:
        """Return the keyring of these PEM texts. Raises ``ValueError`` if they do not belong together."""
        leaf = x509.load_pem_x509_certificate(certificate)
        if public_bytes(leaf.public_key()) != public_bytes(_private_key(key).public_key()):
            raise ValueError("the key belongs to another certificate")
        try:
            leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
            party = party_of_certificate(leaf)
        except Exception as e:  # cryptography's own errors have no common root
            raise ValueError("the certificate belongs to another cluster") from e
        begins, ends = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
        return cls(authority, certificate, key, party, begins, ends)

    def check_clock(self, now: float) -> None:
        """Raise ``ClockWrong`` if the certificate is not valid at ``now``, by this machine's clock."""
        clock = f"this Mac's clock says {date_in_words(now)}"
        if now < self.not_before:
            raise ClockWrong(f"{clock}, but its certificate starts {date_in_words(self.not_before)}: set the clock")
        if now > self.not_after:
            raise ClockWrong(
                f"{clock}, but its certificate expired {date_in_words(self.not_after)}: set the clock if it is wrong,"
                " else join again with a new token (`macpipe token create` on the coordinator's Mac)"
            )


def read_certificate(certificate: bytes) -> tuple[Party, float]:
    """Return the party of a certificate (PEM) and when it expires. Raises ``Unauthenticated``."""
    return read_party(certificate), x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp()


def make_request(key: bytes | None = None) -> tuple[bytes, bytes]:
    """Return a private key and a request to certify it, both PEM. ``key`` (PEM) is used if given.

    The request contains nothing but the public key: the authority decides role, id and name. Raises ``ValueError`` for
    an invalid ``key``.
    """
    private = ec.generate_private_key(ec.SECP256R1()) if key is None else _private_key(key)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(private, SHA256())
    return private_bytes(private), request.public_bytes(Encoding.PEM)


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key as unencrypted PEM, for a file that only its owner can read."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_bytes(key: object) -> bytes:
    """Return a public key as DER with its algorithm (SubjectPublicKeyInfo). Raises ``ValueError`` if not EC P-256."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not an EC P-256 key")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def date_in_words(seconds: float) -> str:
    """Format a time as ``2026-11-23 10:04 UTC``; a time beyond the calendar in seconds."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f} s"


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except TypeError as e:
        raise ValueError("the key is encrypted") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an EC P-256 key")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, e: OSError) -> MacpipeError:
    return ClusterDamaged(f"cannot read {path}: {e.strerror}")
