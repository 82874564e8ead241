"""Where the ranks of a group meet and over what, and in which order they are told of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest

from cluster.coordinator import group_meeting
from cluster.coordinator.group_meeting import GroupMeeting, arrange_meetings
from cluster.coordinator.planner import make_plan
from cluster.coordinator.rdma_devices import match_devices
from cluster.core.errors import WorkerLost
from cluster.core.plan import Link
from cluster.core.process_groups import GroupAddresses, GroupPort, RdmaPort
from cluster.core.worker import WorkerInfo
from placement.test_groups import SHAPE, grouped, mac

pytestmark = pytest.mark.anyio
CABLED = "169.254.7.9"


@dataclass
class Control:
    """Stands in for the client of a worker that measured ``link`` to the next rank; None: it cannot reach it.

    The worker begins to meet the others after ``begins_s``.
    """

    link: Link | None = None
    begins_s: float = 0.0
    told: list[GroupAddresses] = field(default_factory=list)

    async def measure_link(self, source: WorkerInfo) -> Link:
        if self.link is None:
            raise WorkerLost(f"worker {source.name} is not reached")
        return self.link

    async def join_group(self, epoch: int, found: GroupAddresses, *, insecure: bool) -> None:
        assert (epoch, insecure) == (5, True)
        await anyio.sleep(self.begins_s)
        self.told.append(found)


def macs(*data_hosts: str, backend: str = "metal", count: int = 2) -> list[WorkerInfo]:
    names = enumerate(("ada", "bob", "cyd")[:count], start=1)
    found = [mac(name, address=f"10.0.0.{i}") for i, name in names]
    return [replace(one, data_hosts=data_hosts, backend=backend) for one in found]


async def meet(
    workers: Sequence[WorkerInfo], links: Sequence[Link | None], ports: Sequence[tuple[RdmaPort, ...]] = ((), (), ())
) -> GroupAddresses:
    meeting = GroupMeeting(tuple(workers), insecure=True, number=5)
    controls: Any = [Control(link) for link in links]
    async with anyio.create_task_group() as tasks:
        for rank, control in enumerate(controls):
            tasks.start_soon(meeting.attend, rank, control, GroupPort(7001 + rank, ports[rank]))
    (found,) = {one for control in controls for one in control.told}
    return found  # type: ignore[no-any-return]


async def test_ranks_meet_at_the_addresses_of_their_best_links() -> None:
    """A rank listens at the address that the rank before it reaches best, such as that of a Thunderbolt cable."""
    cable = [Link(1e-4, 4e9, address="169.254.7.2:2"), Link(1e-4, 4e9, address="169.254.7.1:2")]
    found = await meet(macs(CABLED), cable)
    assert found == GroupAddresses(("169.254.7.1:7001", "169.254.7.2:7002"), "ring")
    half = await meet(macs(CABLED), [cable[0], None])
    assert half.hosts == ("10.0.0.1:7001", "169.254.7.2:7002"), "what cannot be measured is reached as usual"
    assert (await meet(macs(), cable)).hosts == ("10.0.0.1:7001", "10.0.0.2:7002"), "there is nothing to choose"


async def test_rdma_is_used_where_cables_connect_all_ranks() -> None:
    ports = [(RdmaPort("rdma_en5", "A", "B"),), (RdmaPort("rdma_en4", "B", "A"),)]
    found = await meet(macs(), [None, None], ports)
    assert (found.backend, found.devices) == ("jaccl", (("", "rdma_en5"), ("rdma_en4", "")))
    assert (await meet(macs(), [None, None], [ports[0], ()])).backend == "ring"
    assert (await meet(macs(backend="cuda"), [None, None], ports)).backend == "nccl"


@pytest.mark.parametrize("backend", ["metal", "cuda"])
async def test_ranks_meet_where_all_reach_rank_0_unless_they_form_a_ring_of_connections(backend: str) -> None:
    """The cable from the last rank to rank 0 leads to no other one."""
    workers, cable = macs(CABLED, backend=backend, count=3), Link(1e-4, 4e9, address="169.254.7.1:2")
    ports = [tuple(one) for one in cables((0, 1), (1, 2), (2, 0), count=3)]
    found = await meet(workers, [cable] * 3, ports)
    assert found.backend == ("nccl" if backend == "cuda" else "jaccl")
    assert found.hosts == ("10.0.0.1:7001", "10.0.0.2:7002", "10.0.0.3:7003")


async def test_the_last_rank_begins_once_all_others_have_begun() -> None:
    """It connects first, to one that must listen: MLX tries again only after seconds."""
    meeting, begun = GroupMeeting(tuple(macs(count=3)), insecure=True, number=5), list[int]()

    async def attend(rank: int, control: Any) -> None:
        await meeting.attend(rank, control, GroupPort(7000 + rank))
        begun.append(rank)

    async with anyio.create_task_group() as tasks:
        for rank, begins_s in ((2, 0.0), (0, 0.2), (1, 0.1)):
            tasks.start_soon(attend, rank, Control(begins_s=begins_s))
    assert begun == [1, 0, 2]


async def test_a_load_arranges_a_meeting_of_its_epoch_for_each_group() -> None:
    workers, order = macs(), grouped(("ada", "bob"), insecure_links=(("ada", "bob"),))
    stages = make_plan(5, SHAPE, workers, order).stages
    (meeting,) = arrange_meetings(stages, workers, order.insecure_links).values()
    assert (meeting.names, meeting.number, meeting.insecure) == (("ada", "bob"), 5, True)
    assert not arrange_meetings(stages, workers, ())[0].insecure


@pytest.mark.parametrize(("rank", "missing"), [(0, "bob"), (2, "ada")])
async def test_a_rank_that_stays_away_is_named(monkeypatch: pytest.MonkeyPatch, rank: int, missing: str) -> None:
    monkeypatch.setattr(group_meeting, "GROUP_GATHER_S", 0.01)
    meeting, control = GroupMeeting(tuple(macs(count=3)), insecure=True, number=5), Control()
    with pytest.raises(WorkerLost, match=rf"worker {missing} did not come to the group ada\+bob\+cyd"):
        await meeting.attend(rank, control, GroupPort(7001))  # type: ignore[arg-type]


def cables(*pairs: tuple[int, int], count: int) -> list[list[RdmaPort]]:
    """Return the ports of Macs that these cables connect."""
    ports: list[list[RdmaPort]] = [[] for _ in range(count)]
    for cable, (one, other) in enumerate(pairs):
        for own, peer in ((one, other), (other, one)):
            device = f"rdma_en{len(ports[own]) + 2}"
            ports[own].append(RdmaPort(device, f"{cable}-{own}", f"{cable}-{peer}"))
    return ports


def test_devices_of_a_mesh_a_ring_and_of_less() -> None:
    mesh = match_devices(cables((0, 1), (0, 2), (1, 2), count=3))
    assert mesh == (("", "rdma_en2", "rdma_en3"), ("rdma_en2", "", "rdma_en3"), ("rdma_en2", "rdma_en3", ""))
    ring = match_devices(cables((0, 1), (1, 2), (2, 3), (3, 0), count=4))
    assert ring[0] == ("", "rdma_en2", "", "rdma_en3")
    assert match_devices(cables((0, 1), (1, 2), (2, 3), count=4)) == (), "a chain is no ring"
    assert match_devices([[RdmaPort("rdma_en2", "A", "X")], [RdmaPort("rdma_en2", "B", "Y")]]) == ()


def test_both_ends_choose_the_same_of_two_cables() -> None:
    ports = cables((0, 1), (0, 1), count=2)
    assert match_devices([ports[0], ports[1][::-1]]) == match_devices(ports)
