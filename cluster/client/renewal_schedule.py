"""Decides when this machine's client certificate is renewed, and stores the new one.

It makes no call: the connections send the request (``_renew_certificate`` in ``async_connection`` and ``connection``).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from cluster.core.errors import MacpipeError, Unreachable
from cluster.security.limits import MAX_RENEWAL_RETRY_S, MIN_RENEWAL_RETRY_S, RENEWAL_SPREAD
from cluster.security.trust import WORKER, Trust

log = logging.getLogger(__name__)


class ScheduledRenewal:
    """The renewals of one client: wait until due, send ``make_request``, then ``install`` the reply or ``postpone``.

    Clients of one machine share a certificate. ``spread`` (0 to 1) separates their renewals, so that the first renews
    for all.
    """

    def __init__(self, trust: Trust, clock: Callable[[], float] = time.time, spread: float | None = None) -> None:
        self._trust = trust
        self._clock = clock
        self._spread = random.random() if spread is None else spread  # noqa: S311  # no secret
        self._not_before = 0.0

    @property
    def possible(self) -> bool:
        """Whether this machine has a certificate that a client renews. The coordinator renews a worker's."""
        return self._trust.renewal is not None and not self._trust.me.startswith(f"{WORKER}.")

    def due_in_s(self) -> float:
        """Return the seconds until the next renewal: 0 or less if it is due."""
        from cluster.security.certificate_renewal import due_at

        begins, ends = self._trust.validity
        due = due_at(begins, ends) + self._spread * RENEWAL_SPREAD * (ends - begins)
        return max(due, self._not_before) - self._clock()

    def make_request(self) -> bytes:
        """Return the certificate signing request."""
        assert self._trust.renewal
        return self._trust.renewal.request()

    def install(self, certificate: bytes) -> None:
        """Store the new certificate. Raise MacpipeError if it is not the requested one or cannot be written."""
        assert self._trust.renewal
        self._trust.renewal.install(certificate)
        log.info("certificates: renewed")

    def postpone(self, error: MacpipeError) -> None:
        """Log why the renewal failed. Try again after a tenth of the certificate's remaining life."""
        now = self._clock()
        left_s = self._trust.validity[1] - now
        retry_s = MAX_RENEWAL_RETRY_S  # no coordinator renews a certificate that has ended
        if left_s > 0:
            retry_s = min(max(left_s / 10, MIN_RENEWAL_RETRY_S), MAX_RENEWAL_RETRY_S)
        self._not_before = now + retry_s
        # An unreachable coordinator also fails the caller's own calls.
        level = logging.INFO if isinstance(error, Unreachable) else logging.WARNING
        log.log(level, "certificates: not renewed reason=%s retry_s=%.0f", error.sentence, retry_s)
