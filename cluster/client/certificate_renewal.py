"""Renews the certificate with which this machine asks, some weeks before it ends, by the way of a call."""

from __future__ import annotations

import logging
import time

from cluster.core.errors import MacpipeError
from cluster.security.trust import Trust

log = logging.getLogger(__name__)


class OwnRenewal:
    """One try a client: ``wanted`` says whether it is time; ``request`` comes before the call, ``install`` after."""

    def __init__(self, trust: Trust) -> None:
        self._trust, self._tried = trust, False

    @property
    def wanted(self) -> bool:
        """True once at most."""
        if self._tried or not self._trust.me:
            return False
        from cluster.security.certificate_renewal import is_due

        self._tried = True
        return is_due(*self._trust.valid, time.time())

    def request(self) -> bytes:
        assert self._trust.renewal
        return self._trust.renewal.request()

    def install(self, certificate: bytes) -> None:
        assert self._trust.renewal
        try:
            self._trust.renewal.install(certificate)
        except MacpipeError as e:
            log.warning("this machine's certificate was not renewed: %s", e.sentence)
