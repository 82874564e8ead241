"""The seam from which every server and every channel gets its credentials: whom this process trusts, and who it is.

Without a cluster a process speaks with its own machine alone. In a cluster every connection is mutual TLS (``mutual``):
both ends show a certificate of the cluster's authority, and who dials insists on the name of the party that it means.
Nobody else in the tree makes credentials. Cryptography is imported where there is a cluster, and not before: it takes a
tenth of a second, which no command should wait for in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc

from cluster.core.errors import InvalidOption
from cluster.core.text import is_loopback
from cluster.security.name_check import check_name

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


def open_trust(home: Path, cluster: str, *roles: str, name: str = "") -> Trust:
    """What this machine holds of ``cluster``, as the first of ``roles`` that it has; else alone on itself.

    ``name`` is a worker's. Raises ``InvalidOption`` for a name that is none, ``ClusterDamaged`` for unusable files.
    """
    check_name(cluster, "a cluster's")  # it is the name of a folder too
    if is_member(home, cluster):
        from cluster.security.mtls import open_cluster_trust

        return open_cluster_trust(home, cluster, roles, name) or LocalTrust(cluster)
    return LocalTrust(cluster)


def is_member(home: Path, cluster: str) -> bool:
    """Whether this machine is in the cluster."""
    return (home / "clusters" / cluster / "authority.pem").is_file()


class LocalTrust:
    """No cluster: gRPC's local credentials, whose server refuses a peer that is not on this machine."""

    me: Final = ""
    serial: Final = 0
    valid: Final = (0.0, 0.0)
    members: Final = None
    revocations: Final = None
    renewal: Final = None

    def __init__(self, cluster: str = "default") -> None:
        self._cluster = cluster

    def server(self, host: str) -> grpc.ServerCredentials:
        if not is_loopback(host):
            raise InvalidOption(
                f"whoever reaches {host} could use it: without a cluster macpipe listens on this machine alone. Make a"
                f" cluster with `macpipe init{self._named}`, or enter one with `macpipe join TOKEN{self._named}`",
                field="host",
            )
        return grpc.local_server_credentials()

    def channel(self, host: str, peer: str) -> tuple[grpc.ChannelCredentials, Options]:
        if not is_loopback(host):
            raise InvalidOption(
                f"{host} is another machine, and this one has no certificate for it: make a cluster with"
                f" `macpipe init{self._named}`, or enter one with `macpipe join TOKEN{self._named}` (the token of a Mac"
                " that asks comes from `macpipe token create --role client`)",
                field="host",
            )
        return grpc.local_channel_credentials(), []

    @property
    def _named(self) -> str:
        return "" if self._cluster == "default" else f" --cluster {self._cluster}"

    def party(self, shown: Shown) -> Party | None:
        return None

    def revoked(self, serial: int) -> bool:
        return False
