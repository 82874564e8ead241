"""Certificates for HTTPS: the cluster's own for this Mac, or one that the user gives. Renewed ones are reloaded."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cluster.core.errors import InvalidOption
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.keyring import make_request
from cluster.security.limits import LEAF_S, RENEWAL_SHARE


class HttpCertificate(Protocol):
    """A certificate of an HTTPS server. ``context`` is for its socket; the server calls ``refresh`` periodically."""

    context: ssl.SSLContext

    def refresh(self) -> None:
        """Load a renewed certificate, if there is one. Open connections keep the old one."""


class OwnCertificate:
    """A certificate for ``hosts`` (names and addresses), signed by the cluster's authority and new at each start.

    Raises ``NoCluster`` if this machine does not hold the authority's key.
    """

    def __init__(self, folder: ClusterFolder, hosts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._folder, self._hosts, self._clock = folder, tuple(hosts), clock
        self._place = folder.path / "http"
        self.context = _context()
        self._make()

    def refresh(self) -> None:
        """Replace the certificate after two thirds of its life."""
        if self._clock() >= self._due:
            self._make()

    def _make(self) -> None:
        now = self._clock()
        key, request = make_request()
        certificate = Authority.load(self._folder).sign_http(request, self._hosts, now)
        certificate_file = self._place / "certificate.pem"
        key_file = self._place / "key.pem"
        self._folder.write(key_file, key)
        self._folder.write(certificate_file, certificate)
        self.context.load_cert_chain(certificate_file, key_file)
        self._due = now + RENEWAL_SHARE * LEAF_S


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
