"""Certificates for HTTPS: the cluster's own for this Mac, or one that the user gives. Renewed ones are reloaded."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from cluster.core.errors import AuthorityElsewhere, InvalidOption
from cluster.security.authority import Authority, find_holder
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.keyring import make_request
from cluster.security.limits import LEAF_S, MAX_RENEWAL_RETRY_S, RENEWAL_SHARE

log = logging.getLogger(__name__)


class HttpCertificate(Protocol):
    """A certificate of an HTTPS server. ``context`` is for its socket; the server calls ``refresh`` periodically."""

    context: ssl.SSLContext

    def refresh(self) -> None:
        """Load a renewed certificate, if there is one. Open connections keep the old one."""


class OwnCertificate:
    """A certificate for ``hosts`` (names and addresses), signed by the cluster's authority and new at each start.

    Raises ``NoCluster`` outside a cluster, and ``AuthorityElsewhere`` if this machine does not hold the authority.
    """

    def __init__(self, folder: ClusterFolder, hosts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._folder, self._hosts, self._clock = folder, tuple(hosts), clock
        self._due = 0.0
        self.context = _context()
        self._make()

    def refresh(self) -> None:
        """Replace the certificate after two thirds of its life, unless the authority was moved."""
        if self._clock() >= self._due:
            try:
                self._make()
            except AuthorityElsewhere as e:
                self._due = self._clock() + MAX_RENEWAL_RETRY_S
                log.warning("certificates: HTTPS keeps the old one reason=%s", e.sentence)

    def _make(self) -> None:
        now = self._clock()
        key, request = make_request()
        certificate = Authority.load(self._folder).sign_http(request, self._hosts, now)
        keep_http_certificate(self._folder, key, certificate)
        self.context.load_cert_chain(*_kept_files(self._folder))
        self._due = now + RENEWAL_SHARE * LEAF_S


class KeptCertificate:
    """The certificate that the authority on another machine issued for this one's HTTPS, loaded again when renewed.

    Raises ``AuthorityElsewhere`` if there is none that is valid now.
    """

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.time) -> None:
        self._files = _kept_files(folder)
        self.context = _context()
        self._stamp = _stamps(self._files)
        names, ends = read_http_certificate(folder)
        if not names or ends <= clock():
            raise AuthorityElsewhere(f"HTTPS needs a certificate from {find_holder(folder).place}")
        self.context.load_cert_chain(*self._files)

    def refresh(self) -> None:
        """Load a renewed certificate. Between the two writes of a renewal the old one stays in use."""
        stamp = _stamps(self._files)
        if stamp != self._stamp:
            with suppress(OSError, ssl.SSLError):
                self.context.load_cert_chain(*self._files)
                self._stamp = stamp


def read_http_certificate(folder: ClusterFolder) -> tuple[frozenset[str], float]:
    """Return the hosts of the certificate kept for HTTPS, and when it expires; no hosts if it is unusable."""
    certificate, _ = _kept_files(folder)
    try:
        kept = x509.load_pem_x509_certificate(certificate.read_bytes())
        kept.verify_directly_issued_by(x509.load_pem_x509_certificate(folder.authority.read_bytes()))
        names = kept.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return frozenset(), 0.0
    hosts = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    return frozenset(hosts), kept.not_valid_after_utc.timestamp()


def keep_http_certificate(folder: ClusterFolder, key: bytes, certificate: bytes) -> None:
    """Write a key and its certificate (PEM) for HTTPS. Raises ``InvalidOption`` if they cannot be written."""
    certificate_file, key_file = _kept_files(folder)
    folder.write(key_file, key)
    folder.write(certificate_file, certificate)


def _kept_files(folder: ClusterFolder) -> tuple[Path, Path]:
    return folder.path / "http" / "certificate.pem", folder.path / "http" / "key.pem"


def _stamps(files: tuple[Path, Path]) -> tuple[Stamp, ...]:
    try:
        return tuple(file_version(file) for file in files)
    except OSError:
        return ()


class GivenCertificate:
    """A chain and its key in the user's PEM files, loaded again when they change. Raises ``InvalidOption``."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self.context = _context()
        self._stamp = self._look()
        self._load()

    def refresh(self) -> None:
        """Load changed files. While they do not belong together, the previous certificate stays in use."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._load()
                self._stamp = stamp
        except InvalidOption:
            return  # a renewal writes two files: the next refresh sees both

    def _look(self) -> tuple[Stamp, ...]:
        try:
            return tuple(file_version(file) for file in self._files)
        except OSError as e:
            raise InvalidOption(f"cannot read {e.filename} (--http-cert, --http-key): {e.strerror}") from e

    def _load(self) -> None:
        try:
            _context().load_cert_chain(*self._files, password=_refuse_password)
            self.context.load_cert_chain(*self._files, password=_refuse_password)
        except (ssl.SSLError, OSError, ValueError) as e:
            raise InvalidOption(
                f"--http-cert {self._files[0]} and --http-key {self._files[1]} are not a certificate and its key: {e}"
            ) from e


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _refuse_password() -> str:
    raise ValueError("the key is encrypted; give an unencrypted one")
