"""The gRPC AuthorityService: certificates from the coordinator that holds the authority, and its move."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

import anyio
import grpc

from cluster.coordinator.settings import ServeSettings
from cluster.core.errors import Forbidden, InvalidRequest, MacpipeError
from cluster.security.authority import Authority
from cluster.security.authority_move import AuthorityReceiver, require_holder
from cluster.security.certificate_renewal import renew_certificate
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import MAX_HTTP_HOSTS
from cluster.security.members import Members
from cluster.security.roles import Party, Role
from cluster.security.trust import Trust
from cluster.transport.rich_errors import abort
from cluster.v1 import authority_pb2 as pb
from cluster.v1.authority_pb2_grpc import AuthorityServiceServicer, add_AuthorityServiceServicer_to_server

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
T = TypeVar("T")
_MAX_HOST_CHARS = 253


AUTHORITY: Final = pb.DESCRIPTOR.services_by_name["AuthorityService"]


def add_authority_service(server: grpc.aio.Server, settings: ServeSettings, trust: Trust) -> None:
    """Serve AuthorityService on a coordinator's port, if it is in a cluster."""
    if trust.me:
        servicer = AuthorityServicer(trust, ClusterFolder(settings.home, settings.cluster))
        add_AuthorityServiceServicer_to_server(servicer, server)


class AuthorityServicer(AuthorityServiceServicer):
    """Serves AuthorityService for the coordinator whose certificate is in ``folder``."""

    def __init__(self, trust: Trust, folder: ClusterFolder) -> None:
        self._trust, self._folder = trust, folder
        self._receiver = AuthorityReceiver(folder)

    async def CertifyHttp(self, request: pb.CertifyHttpRequest, context: Context) -> pb.CertifyHttpResponse:
        hosts = tuple(request.hosts)
        if len(hosts) > MAX_HTTP_HOSTS or any(len(host) > _MAX_HOST_CHARS for host in hosts):
            await abort(context, InvalidRequest(f"a certificate has at most {MAX_HTTP_HOSTS} hosts", field="hosts"))

        def certify() -> bytes:
            return Authority.load(self._folder).sign_http(request.request, hosts, time.time())

        return pb.CertifyHttpResponse(certificate=await _run(context, certify))

    async def RenewMember(self, request: pb.RenewMemberRequest, context: Context) -> pb.RenewMemberResponse:
        """Renew for those whom the caller knows as members; this Mac's roster has the last word."""
        caller = self._caller(context)
        if request.role == Role.COORDINATOR and request.id != caller.id:
            await abort(context, Forbidden("a coordinator renews its own certificate itself, not through another one"))

        def certify() -> bytes:
            return renew_certificate(self._folder, _read_role(request.role), request.id, request.request, time.time())

        return pb.RenewMemberResponse(certificate=await _run(context, certify))

    async def OfferKey(self, request: pb.OfferKeyRequest, context: Context) -> pb.OfferKeyResponse:
        return pb.OfferKeyResponse(public_key=await _run(context, self._receiver.offer))

    async def ReceiveAuthority(
        self, request: pb.ReceiveAuthorityRequest, context: Context
    ) -> pb.ReceiveAuthorityResponse:
        sender = self._caller(context)
        await _run(context, lambda: self._receiver.receive(sender, request.encrypted))
        return pb.ReceiveAuthorityResponse()

    async def RecordMove(self, request: pb.RecordMoveRequest, context: Context) -> pb.RecordMoveResponse:
        sender = self._caller(context)

        def record() -> None:
            with self._folder.lock():
                members = Members(self._folder)
                holder = members.authority_holder()
                if holder is not None and holder.id == request.holder:
                    return  # it received the authority itself, or this is a second try
                require_holder(members, sender)
                members.name_authority_holder(request.holder, locked=True)

        await _run(context, record)
        return pb.RecordMoveResponse()

    def _caller(self, context: Context) -> Party:
        shown: Any = context.auth_context()
        party = self._trust.party(shown)
        assert party is not None  # the interceptor refuses others
        return party


def _read_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise InvalidRequest(f"{role[:32]!r} is no role of a member", field="role") from None


async def _run(context: Context, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, which may wait for the disk. An error of macpipe ends the call."""
    try:
        return await anyio.to_thread.run_sync(work)
    except MacpipeError as e:
        await abort(context, e)
        raise  # ``abort`` raises
