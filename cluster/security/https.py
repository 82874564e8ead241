"""What HTTPS shows: the cluster's own certificate for this Mac, or one that was given. Renewed ones are taken on."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cluster.core.errors import InvalidOption
from cluster.security.authority import Authority
from cluster.security.bounds import LEAF_S, RENEWAL_SHARE
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.keyring import make_request


class HttpCertificate(Protocol):
    """``context`` is for a server's socket. ``refresh`` is called now and then, and changes what it shows."""

    context: ssl.SSLContext

    def refresh(self) -> None:
        """Take a renewed certificate, if there is one; connections that are open keep theirs."""


class OwnCertificate:
    """Signed by the cluster's authority for ``hosts``, names and addresses; made anew at each start.

    Raises ``NoCluster`` where this machine does not hold the authority's key.
    """

    def __init__(self, folder: ClusterFolder, hosts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._folder, self._hosts, self._clock = folder, tuple(hosts), clock
        self._place = folder.path / "http"
        self.context = _context()
        self._make()

    def refresh(self) -> None:
        """Make another where most of this one's time is over."""
        if self._clock() >= self._due:
            self._make()

    def _make(self) -> None:
        now = self._clock()
        key, request = make_request()
        certificate = Authority.load(self._folder).sign_http(request, self._hosts, now)
        files = self._place / "certificate.pem", self._place / "key.pem"
        self._folder.write(files[1], key)
        self._folder.write(files[0], certificate)
        self.context.load_cert_chain(*files)
        self._due = now + RENEWAL_SHARE * LEAF_S


class GivenCertificate:
    """A chain and its key as PEM files of the user's, read again when they change. Raises ``InvalidOption``."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self.context = _context()
        self._stamp = self._look()
        self._load()

    def refresh(self) -> None:
        """Read changed files; while they do not belong together, the ones before are shown on."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._load()
                self._stamp = stamp
        except InvalidOption:
            return  # a renewal writes two files: the next look sees both

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
                f"--http-cert {self._files[0]} and --http-key {self._files[1]} are no certificate with its key: {e}"
            ) from e


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _refuse_password() -> str:
    raise ValueError("the key is encrypted; give one that is not")
