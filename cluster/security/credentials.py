"""Open this machine's credentials for a cluster: its certificate, or trust in this machine alone.

Cryptography is imported only if there is a cluster. The import takes 0.1 s, which no other command should pay.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from cluster.core.errors import InvalidOption
from cluster.core.text import is_loopback
from cluster.security.cluster_choice import is_member, worker_names
from cluster.security.name_check import check_name
from cluster.security.trust import ADMIN, CLIENT, COORDINATOR, WORKER, AuthContext, ChannelOptions, Trust

if TYPE_CHECKING:
    from cluster.security.roles import Party


def open_trust(home: Path, cluster: str, *roles: str, name: str = "") -> Trust:
    """Open this machine's trust in ``cluster``, as the first of ``roles`` that it has; else ``LocalTrust``.

    ``name`` is a worker's. Raises ``InvalidOption`` for an invalid name, ``ClusterDamaged`` for unusable files.
    """
    check_name(cluster, "a cluster's")  # before it becomes part of a path
    if is_member(home, cluster):
        from cluster.security.mtls import open_cluster_trust

        return open_cluster_trust(home, cluster, roles, name) or LocalTrust(cluster)
    return LocalTrust(cluster)


def open_caller_trust(home: Path, cluster: str) -> Trust:
    """Open the trust with which this machine calls coordinators: as admin, client, coordinator or worker.

    A Mac with several workers calls as the first by name. Raises as ``open_trust`` does.
    """
    trust = open_trust(home, cluster, ADMIN, CLIENT, COORDINATOR)
    if trust.me or not is_member(home, cluster):
        return trust
    names = worker_names(home, cluster)
    return open_trust(home, cluster, WORKER, name=names[0]) if names else trust


class LocalTrust:
    """Trust without a cluster: gRPC's local credentials, whose server refuses peers on other machines."""

    me: Final = ""
    serial: Final = 0
    validity: Final = (0.0, 0.0)
    members: Final = None
    revocations: Final = None
    renewal: Final = None

    def __init__(self, cluster: str = "default") -> None:
        self._cluster = cluster

    def server(self, host: str) -> grpc.ServerCredentials:
        if not is_loopback(host):
            raise InvalidOption(
                f"macpipe listens on this machine alone without a cluster, because anybody could use {host}. Create a"
                f" cluster with `macpipe init{self._named}`, or enter one with `macpipe join TOKEN{self._named}`",
                field="host",
            )
        return grpc.local_server_credentials()

    def channel(self, host: str, peer: str) -> tuple[grpc.ChannelCredentials, ChannelOptions]:
        if not is_loopback(host):
            raise InvalidOption(
                f"{host} is another machine, and this one has no certificate for it: create a cluster with"
                f" `macpipe init{self._named}`, or enter one with `macpipe join TOKEN{self._named}` (for a Mac that"
                " only sends requests, create the token with `macpipe token create --role client`)",
                field="host",
            )
        return grpc.local_channel_credentials(), []

    @property
    def _named(self) -> str:
        return "" if self._cluster == "default" else f" --cluster {self._cluster}"

    def party(self, shown: AuthContext) -> Party | None:
        return None

    def revoked(self, serial: int) -> bool:
        return False
