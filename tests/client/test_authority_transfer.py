"""The authority moves between coordinators over real connections: with their certificates, to the right one alone."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.api.grpc.authority_service import AuthorityServicer
from cluster.api.grpc.cluster_service import ClusterServicer
from cluster.client.authority_transfer import move_authority
from cluster.coordinator.certificate_issuer import CertificateIssuer
from cluster.coordinator.roster import Roster
from cluster.core.errors import (
    AuthorityElsewhere,
    Forbidden,
    InvalidOption,
    InvalidRequest,
    MemberNotFound,
    Unreachable,
)
from cluster.core.leadership import CoordinatorName
from cluster.discovery.static import static_source
from cluster.security.authority import Authority, find_holder
from cluster.security.authority_move import find_target
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.https import KeptCertificate, read_http_certificate
from cluster.security.keyring import make_request, read_certificate
from cluster.security.members import Member, Members
from cluster.security.mtls import ClusterTrust
from cluster.security.passed_caller import CALLER_METADATA
from cluster.security.roles import Party, Role
from cluster.standby.authority_holder import AuthorityClient, renew_member
from cluster.standby.leads_client import ask_over
from cluster.standby.other_coordinators import OtherCoordinators
from cluster.standby.own_certificates import OwnCertificates
from cluster.transport.grpc_setup import bind, control_channel, public_server
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import authority_pb2 as pb
from cluster.v1 import cluster_pb2
from cluster.v1.authority_pb2_grpc import AuthorityServiceStub, add_AuthorityServiceServicer_to_server
from cluster.v1.cluster_pb2_grpc import ClusterServiceStub, add_ClusterServiceServicer_to_server
from parties import Lead


class Coordinators:
    """Three coordinators of one cluster, each with its folder; the first made the cluster."""

    def __init__(self, home: Path) -> None:
        self.lead = Lead.make(home / "mac-1")
        self.folders = [ClusterFolder(home / f"mac-{n}", "default") for n in (1, 2, 3)]
        for n, folder in enumerate(self.folders, 1):
            self.lead.admit(Role.COORDINATOR, f"mac-{n}-coordinator", f"c{n}" * 8, folder.home)
        for folder in self.folders[1:]:
            folder.write(folder.members, self.folders[0].members.read_bytes())

    def age_certificate(self, n: int) -> Party:
        """Give the n-th coordinator a certificate that is due to be renewed."""
        folder, (key, request) = self.folders[n - 1], make_request()
        now = time.time() - 70 * 86_400
        certificate = self.lead.authority.sign(request, Role.COORDINATOR, f"c{n}" * 8, f"mac-{n}-coordinator", now)
        folder.keep(Role.COORDINATOR, "", key=key, certificate=certificate)
        party, ends = read_certificate(certificate)
        self.lead.members.renew(party, ends)
        return party

    def trust(self, n: int) -> ClusterTrust:
        return self.lead.trust(Role.COORDINATOR, home=self.folders[n - 1].home)

    def target(self, n: int) -> Member:
        return find_target(self.folders[0], f"mac-{n}")

    @asynccontextmanager
    async def serve(self, n: int) -> AsyncIterator[str]:
        """Serve the n-th coordinator's port and yield its address."""
        trust = self.trust(n)
        server = public_server(trust)
        add_ClusterServiceServicer_to_server(_renewals(trust), server)
        add_AuthorityServiceServicer_to_server(AuthorityServicer(trust, self.folders[n - 1]), server)
        port = bind(server, trust, "127.0.0.1", 0)
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)


def _renewals(trust: ClusterTrust) -> ClusterServicer:
    """The public service of a coordinator that has no other one to ask."""
    nothing: Any = None
    assert trust.members
    issuer = CertificateIssuer(trust.renewal.folder, trust.members, nothing)
    return ClusterServicer(nothing, trust, nothing, nothing, nothing, issuer=issuer)


@pytest.fixture
def coordinators(tmp_path: Path) -> Coordinators:
    return Coordinators(tmp_path)


@pytest.mark.anyio
async def test_it_moves_to_the_one_that_is_named_and_the_leader_learns_it(coordinators: Coordinators) -> None:
    first, second, third = coordinators.folders
    async with coordinators.serve(2) as at_second, coordinators.serve(3) as at_third:
        addresses = ["127.0.0.1:1", at_third, at_second]
        await move_authority(first, coordinators.trust(1), coordinators.target(2), addresses, [at_third])
        assert [find_holder(folder).here for folder in (first, second, third)] == [False, True, False]
        assert {find_holder(folder).name for folder in (first, second, third)} == {"mac-2-coordinator"}
        assert not third.authority_key.exists()
        Authority.load(second)
        async with control_channel(coordinators.trust(1), at_second, "coordinator") as channel:
            request = pb.CertifyHttpRequest(request=make_request()[1], hosts=["lab.local", "10.0.0.7"])
            assert b"CERTIFICATE" in (await AuthorityServiceStub(channel).CertifyHttp(request)).certificate


@pytest.mark.anyio
async def test_a_leader_that_does_not_answer_keeps_the_holder(coordinators: Coordinators) -> None:
    first, second, third = coordinators.folders
    async with coordinators.serve(2) as at_second, coordinators.serve(3) as at_third:
        with pytest.raises(Unreachable, match="until then this Mac holds the authority"):
            await move_authority(first, coordinators.trust(1), coordinators.target(2), [at_second], ["127.0.0.1:1"])
        assert find_holder(first).here
        second.write(second.members, third.members.read_bytes())  # the leader's roster, as a standby gets it
        with pytest.raises(AuthorityElsewhere, match="mac-1-coordinator"):
            Authority.load(second)
        await move_authority(first, coordinators.trust(1), coordinators.target(2), [at_second], [at_third])
    assert find_holder(second).here


def test_a_coordinator_without_it_says_how_long_all_goes_on(coordinators: Coordinators) -> None:
    first, second, third = (Roster(static_source(()), "lab", f"c{n}" * 8, coordinators.trust(n)) for n in (1, 2, 3))
    third.hears_coordinator = {"mac-1-coordinator"}.__contains__
    assert first.authority_problem == third.authority_problem == ""
    assert re.fullmatch(
        r"the authority of cluster lab is on the Mac of mac-1-coordinator: Macs join and API keys are managed there "
        r"alone, and no certificate is renewed while no coordinator answers there; "
        r"the first certificate ends 20\d\d-\d\d-\d\d \d\d:\d\d UTC",
        second.authority_problem,
    )


@pytest.mark.anyio
async def test_a_leader_renews_through_the_holder_that_stands_by(coordinators: Coordinators) -> None:
    trust = coordinators.trust(2)
    assert trust.renewal
    assert trust.members
    others = OtherCoordinators(CoordinatorName("mac-2-coordinator", "2"), ask_over(trust))
    issuer = CertificateIssuer(trust.renewal.folder, trust.members, AuthorityClient(trust, others).renew)
    member = coordinators.lead.admit(Role.CLIENT, "amy", "a0" * 8, coordinators.folders[0].home)
    trust.members.merge(coordinators.folders[0].members.read_bytes())
    request = make_request()[1]
    with pytest.raises(AuthorityElsewhere, match="no address is known"):
        await issuer.renew(Role.CLIENT, member.id, request)
    async with coordinators.serve(1) as at_first:
        others.remember([CoordinatorName("mac-1-coordinator", "1", ("127.0.0.1:1", at_first))])
        party, _ = read_certificate(await issuer.renew(Role.CLIENT, member.id, request))
        assert (party.role, party.id, party.name) == (Role.CLIENT, member.id, "amy")
        assert trust.members.admits(party), "it may call this leader at once"
        with pytest.raises(Forbidden, match="renews its own"):
            await issuer.renew(Role.COORDINATOR, "c3" * 8, request)
        with pytest.raises(MemberNotFound):
            await issuer.renew(Role.WORKER, "b0" * 8, request)
        with pytest.raises(InvalidRequest, match="no role"):
            await renew_member(trust, at_first, "king", member.id, request)  # type: ignore[arg-type]
    with pytest.raises(Unreachable):
        await issuer.renew(Role.CLIENT, member.id, request)


@pytest.mark.anyio
async def test_a_coordinator_gets_no_certificate_of_another_one(coordinators: Coordinators) -> None:
    third = coordinators.trust(3).keyring
    mine = coordinators.trust(2)
    async with coordinators.serve(1) as address, control_channel(mine, address, "coordinator") as channel:
        request = cluster_pb2.RenewCertificateRequest(request=make_request()[1])
        call = ClusterServiceStub(channel).RenewCertificate
        with pytest.raises(Exception) as refused:  # noqa: PT011
            await call(request, metadata=((CALLER_METADATA, third.certificate),))
        assert isinstance(from_rpc_error(refused.value, address), Forbidden)
        renewed, _ = read_certificate((await call(request)).certificate)
    assert renewed.id == "c2" * 8, "its own is renewed"


@pytest.mark.anyio
async def test_the_leader_renews_what_a_standby_needs(coordinators: Coordinators) -> None:
    first, second, _ = coordinators.folders
    old = coordinators.age_certificate(2)
    trust = coordinators.trust(2)
    with pytest.raises(AuthorityElsewhere, match="HTTPS needs a certificate"):
        KeptCertificate(second)
    own = OwnCertificates(trust, ["lab.local", "10.0.0.7"])
    assert trust.renewal
    async with coordinators.serve(1) as at_first:
        await own.renew(trust.renewal, at_first)
        renewed, kept = trust.serial, read_http_certificate(second)
        await own.renew(trust.renewal, at_first)
    assert renewed != old.serial
    assert Members(first).admits(trust.keyring.party)
    assert kept[0] == {"lab.local", "10.0.0.7"}
    assert (trust.serial, read_http_certificate(second)) == (renewed, kept), "nothing is renewed before it is due"
    port = KeptCertificate(second)
    port.refresh()


@pytest.mark.anyio
async def test_nobody_else_gets_or_sends_it(coordinators: Coordinators) -> None:
    first = coordinators.folders[0]
    async with coordinators.serve(3) as at_third:
        with pytest.raises(Unreachable, match=r"mac-2-coordinator does not answer at 127\.0\.0\.1"):
            await move_authority(first, coordinators.trust(1), coordinators.target(2), [at_third], [])
        async with control_channel(coordinators.trust(2), at_third, "coordinator") as channel:
            stub = AuthorityServiceStub(channel)
            for call, request in (
                (stub.ReceiveAuthority, pb.ReceiveAuthorityRequest(encrypted=b"x")),
                (stub.RecordMove, pb.RecordMoveRequest(holder="c2" * 8)),
            ):
                with pytest.raises(Exception) as refused:  # noqa: PT011  # grpc's class has no name of its own
                    await call(request)
                assert isinstance(from_rpc_error(refused.value, at_third), Forbidden)
            with pytest.raises(Exception) as refused:  # noqa: PT011
                await stub.CertifyHttp(pb.CertifyHttpRequest(request=make_request()[1], hosts=["x"] * 65))
            assert isinstance(from_rpc_error(refused.value, at_third), InvalidRequest)
    assert find_holder(first).here


@pytest.mark.anyio
async def test_the_holder_keeps_its_only_key_whoever_it_is_told_to_move_it_to(coordinators: Coordinators) -> None:
    first, second, _ = coordinators.folders
    itself = next(one for one in Members(first).current() if one.name == "mac-1-coordinator")
    async with coordinators.serve(1) as at_first:
        with pytest.raises(Forbidden, match="mac-1-coordinator holds the authority already"):
            await move_authority(first, coordinators.trust(1), itself, [at_first], [at_first])
        for name in ("mac-1", "mac-1-coordinator"):
            with pytest.raises(InvalidOption, match="this Mac's own coordinator"):
                find_target(first, name)
    async with coordinators.serve(2) as at_second:
        second.authority.write_bytes(b"damaged")  # it cannot tell whose key this is, and stores none
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever it answers
            await move_authority(first, coordinators.trust(1), coordinators.target(2), [at_second], [])
    Authority.load(first)
    assert not second.authority_key.exists()
