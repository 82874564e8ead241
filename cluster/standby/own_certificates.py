"""Keep a coordinator's own certificates: the authority on its Mac signs them, else that on the holder's.

The new keys are made here and stay here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
import grpc

from cluster.core.errors import MacpipeError, Reason
from cluster.core.limits import CONTROL_TIMEOUT_S
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.authority_holder import renew_member
from cluster.transport.grpc_setup import control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import authority_pb2
from cluster.v1.authority_pb2_grpc import AuthorityServiceStub

if TYPE_CHECKING:  # grpc's classes are subscriptable only for type checkers
    from cluster.security.certificate_renewal import Renewal
    from cluster.security.cluster_folder import ClusterFolder

    Method = grpc.aio.UnaryUnaryMultiCallable

log = logging.getLogger(__name__)
Q = TypeVar("Q")
R = TypeVar("R")


class OwnCertificates:
    """The certificates of one coordinator: its own, and HTTPS's for ``http_hosts`` if another Mac must issue it."""

    def __init__(self, trust: Trust, http_hosts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._trust, self._http_hosts, self._clock = trust, tuple(http_hosts), clock
        self._reported: Reason | None = None

    async def run(self, addresses: Callable[[], Sequence[str]]) -> None:
        """Renew what is due, until cancelled. ``addresses`` returns where the authority's holder may be now.

        Does nothing without a cluster.
        """
        from cluster.security.limits import RENEWAL_LOOK_S

        while self._trust.renewal is not None:
            await anyio.sleep(RENEWAL_LOOK_S)
            await self.renew_by_any(addresses())

    async def renew_by_any(self, addresses: Sequence[str]) -> None:
        """Renew what is due, by this Mac's authority or the first coordinator at ``addresses`` that can.

        A failure is logged.
        """
        from cluster.security.authority import find_holder

        problem: MacpipeError | None = None
        renewal = self._trust.renewal
        if renewal is None:
            return
        holder = await anyio.to_thread.run_sync(find_holder, renewal.folder, self._trust.members)
        if holder.here:
            await self.renew_here(renewal)
            return
        for address in addresses:
            try:
                await self.renew(renewal, address)
            except MacpipeError as e:
                problem = e
            else:
                self._reported = None
                return
        if problem is not None:
            self._report(problem)

    def _report(self, problem: MacpipeError) -> None:
        if problem.reason is not self._reported:
            self._reported = problem.reason
            log.warning("certificates: not renewed reason=%s", problem.sentence)

    async def renew_here(self, renewal: Renewal) -> None:
        """Renew this coordinator's certificate by the authority on this Mac, if it is due. A failure is logged."""
        from cluster.security.certificate_renewal import is_due, renew_certificate

        def renew() -> None:
            own = renewal.held().party
            renewal.install(renew_certificate(renewal.folder, own.role, own.id, renewal.request(), self._clock()))

        if is_due(*self._trust.validity, self._clock()):
            try:
                await anyio.to_thread.run_sync(renew)
            except MacpipeError as e:
                self._report(e)
            else:
                log.info("certificates: renewed own certificate")

    async def renew(self, renewal: Renewal, address: str) -> None:
        """Renew the certificates that are due by the coordinator at ``address``. Raises ``MacpipeError``."""
        from cluster.security.certificate_renewal import is_due
        from cluster.security.https import keep_http_certificate
        from cluster.security.keyring import make_request

        now = self._clock()
        if is_due(*self._trust.validity, now):
            own = renewal.held().party
            certificate = await renew_member(self._trust, address, own.role, own.id, renewal.request())
            await anyio.to_thread.run_sync(renewal.install, certificate)
            log.info("certificates: renewed own certificate")
        if self._http_hosts and self._http_due(renewal.folder, now):
            key, csr = make_request()
            async with control_channel(self._trust, address, COORDINATOR) as channel:
                wanted = authority_pb2.CertifyHttpRequest(request=csr, hosts=self._http_hosts)
                issued = await _call(AuthorityServiceStub(channel).CertifyHttp, wanted, address)
            await anyio.to_thread.run_sync(keep_http_certificate, renewal.folder, key, issued.certificate)
            log.info("certificates: renewed that of HTTPS")

    def _http_due(self, folder: ClusterFolder, now: float) -> bool:
        """Return whether HTTPS has no certificate for its hosts, or one of which two thirds are over."""
        from cluster.security.certificate_renewal import is_due
        from cluster.security.https import read_http_certificate
        from cluster.security.limits import LEAF_S

        hosts, ends = read_http_certificate(folder)
        return not hosts >= set(self._http_hosts) or is_due(ends - LEAF_S, ends, now)


async def _call(method: Method[Q, R], request: Q, address: str) -> R:
    """Return the answer of a call. Raises ``MacpipeError``."""
    try:
        return await method(request, timeout=CONTROL_TIMEOUT_S)
    except grpc.RpcError as e:
        raise from_rpc_error(e, address) from None
