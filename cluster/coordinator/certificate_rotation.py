"""Keep cluster membership current on every Mac: announce removals at once and renew certificates in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import anyio

from cluster.coordinator.roster import Roster, RosterEntry
from cluster.core.errors import MacpipeError
from cluster.core.worker import WorkerInfo
from cluster.security.limits import RENEWAL_LOOK_S, REVOCATION_LOOK_S

if TYPE_CHECKING:
    from cluster.security.certificate_renewal import Renewal
    from cluster.security.cluster_folder import ClusterFolder

log = logging.getLogger(__name__)


class CertificateRotation:
    """Spreads revocations and renews certificates. Does nothing without a cluster.

    ``ask`` asks every worker to describe itself; that call also carries the list of revoked certificates.
    """

    def __init__(
        self,
        roster: Roster,
        ask: Callable[[], Awaitable[tuple[RosterEntry, ...]]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._roster, self._ask, self._clock = roster, ask, clock
        self._trust = roster.trust

    async def run(self) -> None:
        """Run until cancelled."""
        if self._trust.members is None or (renewal := self._trust.renewal) is None:
            return
        known = self._trust.members.revoked()
        checked_at = float("-inf")
        while True:
            try:
                if known != (known := self._trust.members.revoked()):
                    await self._ask()
                if time.monotonic() - checked_at > RENEWAL_LOOK_S:
                    checked_at = time.monotonic()
                    await self.renew(renewal)
            except MacpipeError as e:
                log.warning("certificates: cannot refresh cluster membership reason=%s", e.sentence)
            await anyio.sleep(REVOCATION_LOOK_S)

    async def renew(self, renewal: Renewal) -> None:
        """Renew the certificates that are due: this coordinator's, then those of the workers that answer now.

        Does nothing while the authority is on another Mac, of which ``status`` warns.
        """
        from cluster.security.authority import find_holder
        from cluster.security.certificate_renewal import is_due

        if not find_holder(renewal.folder, self._trust.members).here:
            return
        if is_due(*self._trust.validity, self._clock()):
            await anyio.to_thread.run_sync(self._renew_own, renewal)
        for member in await self._ask():
            if member.reachable and member.info.certificate[1] and is_due(*member.info.certificate, self._clock()):
                await self._renew_worker(member.info, renewal.folder)

    def _renew_own(self, renewal: Renewal) -> None:
        from cluster.security.certificate_renewal import renew_certificate

        own = renewal.held().party
        renewal.install(renew_certificate(renewal.folder, own.role, own.id, renewal.request(), self._clock()))
        log.info("certificates: renewed own certificate")

    async def _renew_worker(self, info: WorkerInfo, folder: ClusterFolder) -> None:
        from cluster.security.certificate_renewal import renew_certificate
        from cluster.security.roles import Role

        certify = partial(renew_certificate, folder, Role.WORKER, info.id, now=self._clock())
        try:
            await self._roster.control(info.control_address).renew(certify)
        except MacpipeError as e:
            log.warning("certificates: not renewed reason=%s worker=%s", e.sentence, info.name)
        else:
            log.info("certificates: renewed worker=%s", info.name)
