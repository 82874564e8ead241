"""The interface through which every server and channel gets its credentials.

Without a cluster a process talks to its own machine alone. In a cluster every connection is mutual TLS (``mtls``): both
ends present a certificate of the cluster's authority, and the client checks the name of the party that it dials.
``credentials`` decides which of the two applies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc

if TYPE_CHECKING:
    from cluster.security.certificate_renewal import Renewal
    from cluster.security.members import Members
    from cluster.security.revocations import Revocations
    from cluster.security.roles import Party

ChannelOptions = list[tuple[str, Any]]
AuthContext = Mapping[str, Iterable[bytes]]
"""The peer's ``auth_context``, as gRPC gives it."""
COORDINATOR: Final = "coordinator"
REMOVED_METADATA: Final = "x-macpipe-removed"
"""Trailing metadata of a refusal: whoever made this connection was removed from the cluster."""
PASSER_REMOVED_METADATA: Final = "x-macpipe-passer-removed"
"""Trailing metadata of a refusal: the standby that passed the call on was removed from the cluster, not its caller."""
WORKER: Final = "worker"
"""As a peer name: any worker of the cluster."""
ADMIN: Final = "admin"
CLIENT: Final = "client"


def worker_of(worker_id: str) -> str:
    """Return the peer name of the worker with this id."""
    return f"{WORKER}.{worker_id}"


class Trust(Protocol):
    """The credentials of one process, and its view of others'. Its methods may be called from any thread."""

    @property
    def me(self) -> str:
        """The name by which others dial this process, such as ``worker.0123456789abcdef``; empty without a cluster."""

    @property
    def serial(self) -> int:
        """The serial of this process's current certificate; 0 without a cluster."""

    def server(self, host: str) -> grpc.ServerCredentials:
        """Return credentials for listening on ``host``. Raises ``InvalidOption`` if strangers could connect."""

    def channel(self, host: str, peer: str) -> tuple[grpc.ChannelCredentials, ChannelOptions]:
        """Return credentials and options for dialling ``peer`` at ``host``: ``ROLE.ID``, or ``ROLE`` for any of it.

        Raises ``InvalidOption`` if the peer could not be authenticated, ``ClockWrong`` if this process's own
        certificate is not valid now.
        """

    def party(self, shown: AuthContext) -> Party | None:
        """Return the caller by the certificate that it presented; None for a stranger."""

    def revoked(self, serial: int) -> bool:
        """Return whether a certificate of the cluster was revoked. Raises ``ClusterDamaged``."""

    @property
    def validity(self) -> tuple[float, float]:
        """The start and end of the current certificate's validity, in seconds since the epoch; zeros without one."""

    @property
    def members(self) -> Members | None:
        """The cluster's roster, which every coordinator keeps; None for every other role."""

    @property
    def revocations(self) -> Revocations | None:
        """The revoked serials that a worker was told; None for every other role."""

    @property
    def renewal(self) -> Renewal | None:
        """The renewal of this process's certificate; None without a cluster."""
