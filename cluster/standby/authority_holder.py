"""Reach the coordinator that holds the cluster's authority, which need not be the one that leads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from cluster.core.errors import AuthorityElsewhere, MacpipeError, Unreachable
from cluster.core.limits import CONTROL_TIMEOUT_S
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.other_coordinators import OtherCoordinators
from cluster.transport.grpc_setup import control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import authority_pb2
from cluster.v1.authority_pb2_grpc import AuthorityServiceStub

if TYPE_CHECKING:
    from cluster.security.roles import Role

__all__ = ["AuthorityClient", "renew_member"]


class AuthorityClient:
    """The authority's holder as a coordinator knows it: by its roster, and by ``others``."""

    def __init__(self, trust: Trust, others: OtherCoordinators) -> None:
        self._trust, self._others = trust, others

    def addresses(self) -> tuple[str, ...]:
        """Return where the holder answers gRPC, as far as it is known; none without a cluster."""
        holder = self._trust.members.authority_holder() if self._trust.members else None
        return self._others.addresses_of(holder.name) if holder else ()

    async def renew(self, role: Role, id: str, request: bytes) -> bytes:  # noqa: A002
        """Return a new certificate (PEM) for a member by its request. Raises the holder's error.

        Raises ``AuthorityElsewhere`` if nobody knows where the holder is, and ``Unreachable`` if it does not answer.
        """
        error: MacpipeError = AuthorityElsewhere(
            "no address is known of the coordinator that holds the cluster's authority; start it with"
            " `macpipe serve --standby` on its Mac"
        )
        for address in self.addresses():
            try:
                return await renew_member(self._trust, address, role, id, request)
            except Unreachable as e:
                error = e
        raise error


async def renew_member(trust: Trust, address: str, role: Role, id: str, request: bytes) -> bytes:  # noqa: A002
    """Have the coordinator at ``address`` renew the certificate (PEM) of a member. Raises its error."""
    wanted = authority_pb2.RenewMemberRequest(role=role, id=id, request=request)
    async with control_channel(trust, address, COORDINATOR) as channel:
        try:
            answer = await AuthorityServiceStub(channel).RenewMember(wanted, timeout=CONTROL_TIMEOUT_S)
        except grpc.RpcError as e:
            raise from_rpc_error(e, address, peer="other coordinator") from None
    return bytes(answer.certificate)
