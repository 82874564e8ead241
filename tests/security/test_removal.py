"""A Mac that was removed from its cluster learns it: from its own lists, or from whoever refuses it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.core.errors import MemberRemoved, Unreachable
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeaderClaim
from cluster.security import removal
from cluster.security.credentials import LocalTrust
from cluster.security.removal import await_removal, require_member
from cluster.security.roles import Role
from cluster.security.trust import COORDINATOR, WORKER
from cluster.standby.leads_client import ask_over
from cluster.transport.grpc_setup import bind, public_server
from cluster.v1 import leader_pb2
from cluster.v1.leader_pb2_grpc import LeaderServiceServicer, add_LeaderServiceServicer_to_server
from parties import Lead

pytestmark = pytest.mark.anyio
CLAIM = LeaderClaim(CoordinatorName("mac-2", "b", ("mac-2:7700",)), CoordinatorRole.STANDBY, 0, None)


@pytest.fixture
def lead(tmp_path: Path) -> Lead:
    made = Lead.make(tmp_path / "mac-1")
    made.admit_coordinator()
    made.admit(Role.COORDINATOR, "mac-2", "2" * 16, tmp_path / "mac-2")
    return made


class Leads(LeaderServiceServicer):
    """A leader as another coordinator sees it."""

    async def Leads(self, request: leader_pb2.LeadsRequest, context: object) -> leader_pb2.LeadsResponse:
        return leader_pb2.LeadsResponse(term=7)


async def test_a_coordinator_that_the_leader_removed_is_told_so_and_not_while_it_is_out_of_reach(
    lead: Lead, tmp_path: Path
) -> None:
    trust = lead.trust(Role.COORDINATOR)
    server = public_server(trust)
    add_LeaderServiceServicer_to_server(Leads(), server)
    address = f"127.0.0.1:{bind(server, trust, '127.0.0.1', 0)}"
    ask = ask_over(lead.trust(Role.COORDINATOR, "", tmp_path / "mac-2"))
    with pytest.raises(Unreachable):
        await ask(address, CLAIM)
    await server.start()
    assert (await ask(address, CLAIM)).term == 7
    lead.members.remove("mac-2")
    with pytest.raises(MemberRemoved, match="mac-2 was removed from this cluster"):
        await ask(address, CLAIM)
    await server.stop(None)


async def test_a_coordinator_finds_its_removal_in_the_list_that_it_got_and_is_told_what_to_do(
    lead: Lead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "REVOCATION_LOOK_S", 0.01)
    trust = lead.trust(Role.COORDINATOR, "", tmp_path / "mac-2")
    assert trust.members
    trust.members.merge(lead.folder.members.read_bytes())
    require_member(trust, "default", COORDINATOR)
    looking = asyncio.create_task(await_removal(trust, "default", COORDINATOR))
    trust.folder.members.write_bytes(b"damaged")
    await asyncio.sleep(0.1)
    assert not looking.done()
    lead.members.remove("mac-2")
    trust.folder.members.write_bytes(lead.folder.members.read_bytes())
    with pytest.raises(MemberRemoved, match=r"removed from the cluster default; .*`macpipe token create --role coord"):
        await asyncio.wait_for(looking, 10)


async def test_a_worker_finds_its_removal_and_a_mac_without_a_cluster_none(lead: Lead, tmp_path: Path) -> None:
    lead.admit_worker("ada", tmp_path / "mac-3")
    trust = lead.trust(Role.WORKER, "ada", tmp_path / "mac-3")
    assert trust.revocations
    require_member(trust, "default", WORKER)
    trust.revocations.learn({trust.serial})
    with pytest.raises(MemberRemoved, match="`macpipe token create` on the Mac with"):
        require_member(trust, "default", WORKER)
    await await_removal(LocalTrust(), "default", COORDINATOR)
