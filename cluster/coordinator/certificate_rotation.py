"""Keep cluster membership current on every Mac: announce removals at once and renew certificates in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from cluster.coordinator.certificate_issuer import CertificateIssuer
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.core.errors import MacpipeError
from cluster.core.worker import WorkerInfo
from cluster.security.limits import RENEWAL_LOOK_S, REVOCATION_LOOK_S

log = logging.getLogger(__name__)


class CertificateRotation:
    """Spreads revocations and renews workers' certificates.

    ``ask`` asks every worker to describe itself; that call also carries the list of revoked certificates.
    """

    def __init__(
        self,
        roster: Roster,
        ask: Callable[[], Awaitable[tuple[RosterEntry, ...]]],
        issuer: CertificateIssuer,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._roster, self._ask, self._issuer, self._clock = roster, ask, issuer, clock
        self._members = roster.trust.members

    async def run(self) -> None:
        """Run until cancelled. Does nothing without a cluster."""
        if self._members is None:
            return
        known = self._members.revoked()
        checked_at = float("-inf")
        problem = ""
        while True:
            try:
                if known != (known := self._members.revoked()):
                    await self._ask()
                if time.monotonic() - checked_at > RENEWAL_LOOK_S:
                    checked_at = time.monotonic()
                    if bool(problem) != bool(problem := self._roster.authority_problem):
                        _log_authority(problem)
                    await self.renew()
            except MacpipeError as e:
                log.warning("certificates: cannot refresh cluster membership reason=%s", e.sentence)
            await anyio.sleep(REVOCATION_LOOK_S)

    async def renew(self) -> None:
        """Renew the certificates that are due of the workers that answer now, unless the authority's Mac does not."""
        from cluster.security.certificate_renewal import is_due

        if self._roster.authority_problem:
            return
        for member in await self._ask():
            if member.reachable and member.info.certificate[1] and is_due(*member.info.certificate, self._clock()):
                await self._renew_worker(member.info)

    async def _renew_worker(self, info: WorkerInfo) -> None:
        from cluster.security.roles import Role

        try:
            await self._roster.control(info.control_address).renew(partial(self._issuer.renew, Role.WORKER, info.id))
        except MacpipeError as e:
            log.warning("certificates: not renewed reason=%s worker=%s", e.sentence, info.name)
        else:
            log.info("certificates: renewed worker=%s", info.name)


def _log_authority(problem: str) -> None:
    if problem:
        log.warning("certificates: the authority is out of reach reason=%s", problem)
    else:
        log.info("certificates: the authority answers again")
