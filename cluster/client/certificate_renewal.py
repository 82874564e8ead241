"""Renews this machine's client certificate some weeks before it expires, along with an ordinary call."""

from __future__ import annotations

import logging
import time

from cluster.core.errors import MacpipeError
from cluster.security.trust import Trust

log = logging.getLogger(__name__)


class OwnRenewal:
    """At most one renewal per client: check ``wanted``, send ``request``, then ``install`` the reply."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._tried = False

    @property
    def wanted(self) -> bool:
        """Whether a renewal is due. True at most once."""
        if self._tried or not self._trust.me:
            return False
        from cluster.security.certificate_renewal import is_due

        self._tried = True
        return is_due(*self._trust.valid, time.time())

    def request(self) -> bytes:
        """Return the certificate signing request."""
        assert self._trust.renewal
        return self._trust.renewal.request()

    def install(self, certificate: bytes) -> None:
        """Store the new certificate. Log a failure: the current certificate is still valid."""
        assert self._trust.renewal
        try:
            self._trust.renewal.install(certificate)
        except MacpipeError as e:
            log.warning("certificate not renewed: %s", e.sentence)
