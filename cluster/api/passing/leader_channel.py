"""The connection from a standby to the coordinator that leads."""

from __future__ import annotations

from collections.abc import Callable

from grpc import aio

from cluster.core.errors import NotLeader
from cluster.core.leadership import CoordinatorName
from cluster.core.limits import RETRY_AFTER_S
from cluster.security.trust import COORDINATOR, Trust
from cluster.transport.grpc_setup import passing_channel


class StandbyRemoved(NotLeader):
    """The leader refuses this standby, whatever its callers ask: it was removed from the cluster."""

    def __init__(self) -> None:
        super().__init__(
            "this coordinator was removed from the cluster and ends; ask another one", retry_after_s=RETRY_AFTER_S
        )


class LeaderChannel:
    """Dials whoever ``leader`` names, at the first of its addresses that was not found unreachable last.

    ``problem`` says why this standby follows nobody; "" if it does not know.
    """

    def __init__(
        self, trust: Trust, leader: Callable[[], CoordinatorName | None], problem: Callable[[], str] = str
    ) -> None:
        self._trust, self._leader, self._problem = trust, leader, problem
        self._instance = ""
        self._tried = 0
        """Number of addresses of this leader that were unreachable in a row."""
        self._open: tuple[str, aio.Channel] | None = None

    def open(self) -> tuple[str, aio.Channel]:
        """Return the leader's address and a channel to it. Keep the channel while a call runs on it.

        Raises ``NotLeader`` if nobody is known to lead, and as ``Trust.channel``.
        """
        leader = self._leader()
        if leader is None or not leader.addresses:
            why = self._problem() or "try again, or start one with `macpipe serve MODEL`"
            raise NotLeader(f"this coordinator stands by, and none leads now; {why}", retry_after_s=RETRY_AFTER_S)
        if leader.instance != self._instance:
            self._instance, self._tried = leader.instance, 0
        address = leader.addresses[self._tried % len(leader.addresses)]
        if self._open is None or self._open[0] != address:
            self._open = address, passing_channel(self._trust, address, COORDINATOR)
        return self._open

    def leave(self, address: str) -> NotLeader:
        """Dial another address of the leader from now on. Return the error of a call that did not reach this one."""
        if self._open and self._open[0] == address:
            self._open = None
            self._tried += 1
        return NotLeader(
            f"the coordinator that leads does not answer at {address}; try again", retry_after_s=RETRY_AFTER_S
        )
