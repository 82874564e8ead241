"""The seam from which every server and every channel gets its credentials: whom this process trusts, and who it is.

Without a cluster a process speaks with its own machine alone. In a cluster every connection is mutual TLS (``mutual``):
both ends show a certificate of the cluster's authority, and who dials insists on the name of the party that it means.
``credentials`` says which of the two holds here.
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

Options = list[tuple[str, Any]]
Shown = Mapping[str, Iterable[bytes]]
"""What gRPC knows of the other end of a call: its ``auth_context``."""
COORDINATOR: Final = "coordinator"
WORKER: Final = "worker"
"""As a peer: any worker of the cluster."""
ADMIN: Final = "admin"
CLIENT: Final = "client"


def worker_of(worker_id: str) -> str:
    """As a peer: the worker with this id."""
    return f"{WORKER}.{worker_id}"


class Trust(Protocol):
    """Whom one process trusts. Its methods may be called from any thread."""

    @property
    def me(self) -> str:
        """The name by which others dial this process, as in ``worker.0123456789abcdef``; empty without a cluster."""

    @property
    def serial(self) -> int:
        """Of the certificate that this process shows now; 0 without a cluster."""

    def server(self, host: str) -> grpc.ServerCredentials:
        """Credentials for listening on ``host``. Raises ``InvalidOption`` where strangers could connect."""

    def channel(self, host: str, peer: str) -> tuple[grpc.ChannelCredentials, Options]:
        """Credentials and options for dialling ``peer`` at ``host``: ``ROLE.ID``, or ``ROLE`` for anybody of it.

        Raises ``InvalidOption`` where it could not be told from a stranger, ``ClockWrong`` where this process's own
        certificate is not valid now.
        """

    def party(self, shown: Shown) -> Party | None:
        """Who calls, by the certificate that it has shown; None for a stranger."""

    def revoked(self, serial: int) -> bool:
        """Whether a certificate of the cluster is good no more. Raises ``ClusterDamaged``."""

    @property
    def valid(self) -> tuple[float, float]:
        """From when to when that certificate is, in seconds since the epoch; zeros without a cluster."""

    @property
    def members(self) -> Members | None:
        """Who was admitted to the cluster, where this machine decides that."""

    @property
    def revocations(self) -> Revocations | None:
        """What a worker was told is revoked; None for all others."""

    @property
    def renewal(self) -> Renewal | None:
        """How this process gets a further certificate; None without a cluster."""
