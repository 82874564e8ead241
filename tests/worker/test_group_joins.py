"""How an engine comes into its group: the port that is held, the addresses that are awaited, and what is refused."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from cluster.codec.group_port import decode_group_port, encode_rdma_ports
from cluster.core.errors import InsecureGroup, InvalidRequest, PortInUse, StaleEpoch, WorkerLost
from cluster.core.process_groups import GroupAddresses, GroupPort, RdmaPort
from cluster.v1 import worker_pb2 as pb
from cluster.worker import group_joins
from cluster.worker.group_joins import GroupJoins, require_group_addresses
from cluster.worker.held_port import HeldPort
from cluster.worker.pipe_messages import GroupPortHeld, HoldGroupPort, JoinGroup, Progress, pack, read, unpacker

HOSTS = ("127.0.0.1:7001", "127.0.0.1:7002")
LOAD = pb.LoadStageRequest(epoch=5, rank=1, ranks=2)


class Engine:
    """Stands in for a supervisor, whose engine holds port 7002 and, once it ``may_begin``, finds the others.

    It never does if it ``hangs``.
    """

    def __init__(self, *, hangs: bool = False, rdma: bool = False) -> None:
        self.hangs, self.rdma = hangs, rdma
        self.asked: list[Any] = []
        self.killed = ""
        self.silent = False
        self.may_begin = anyio.Event()
        self.may_begin.set()

    async def ask(self, make: Callable[[int], Any]) -> Any:
        self.asked.append(make(len(self.asked) + 1))
        return GroupPortHeld(1, 7002, self.rdma)

    async def events(self, make: Callable[[int], Any], stall_s: float) -> AsyncIterator[Progress]:
        self.asked.append(make(len(self.asked) + 1))
        if self.hangs:
            await anyio.sleep_forever()
        await self.may_begin.wait()
        yield Progress(2, 0, 0)

    @contextmanager
    def silence(self) -> Iterator[None]:
        self.silent = True
        yield
        self.silent = False

    def reset(self, why: str) -> None:
        self.killed = why


async def join(joins: GroupJoins, engine: Engine, load: pb.LoadStageRequest = LOAD, *, named: bool = True) -> int:
    """Join, once the port is told and the ranks are ``named``. Return the port."""
    port, told = 0, None
    try:
        async for found in joins.join(engine, load.epoch, load.rank, load.ranks):  # type: ignore[arg-type]
            port = found.number
            if named:
                told = asyncio.create_task(deliver_twice(joins, load.epoch))
    finally:
        if told:
            await told
    return port


async def deliver_twice(joins: GroupJoins, epoch: int) -> None:
    await joins.deliver(epoch, GroupAddresses(HOSTS, "ring"))
    with pytest.raises(StaleEpoch):
        await joins.deliver(epoch, GroupAddresses(HOSTS, "ring"))


@pytest.mark.anyio
async def test_an_engine_joins_the_ranks_that_the_coordinator_names() -> None:
    joins, engine = GroupJoins(), Engine()
    with pytest.raises(StaleEpoch):
        await joins.deliver(5, GroupAddresses(HOSTS, "ring"))
    assert await join(joins, engine) == 7002
    assert engine.asked == [HoldGroupPort(1), JoinGroup(2, 1, HOSTS, "ring")]
    assert not engine.killed


@pytest.mark.anyio
async def test_the_addresses_are_delivered_once_the_engine_begins_to_meet_the_others() -> None:
    joins, engine = GroupJoins(), Engine()
    engine.may_begin = anyio.Event()
    answers = joins.join(engine, LOAD.epoch, LOAD.rank, LOAD.ranks)  # type: ignore[arg-type]
    assert await anext(answers) == GroupPort(7002)
    delivering = asyncio.create_task(joins.deliver(5, GroupAddresses(HOSTS, "ring")))
    ending = asyncio.create_task(anext(answers, None))
    await anyio.wait_all_tasks_blocked()
    assert (len(engine.asked), delivering.done()) == (2, False)
    assert engine.silent, "it answers nothing until it has met them"
    engine.may_begin.set()
    await delivering
    assert await ending is None
    assert not engine.silent


@pytest.mark.anyio
@pytest.mark.parametrize("rdma", [False, True])
async def test_the_ports_for_rdma_are_told_where_mlx_can_use_them(rdma: bool) -> None:
    ports = (RdmaPort("rdma_en5", "A", "B"),)
    answers = GroupJoins(find_rdma_ports=lambda: ports).join(Engine(rdma=rdma), 5, 1, 2)  # type: ignore[arg-type]
    told = await anext(answers)
    await answers.aclose()
    assert told == GroupPort(7002, ports if rdma else ())
    sent = pb.LoadStageResponse(group_port=told.number, rdma_ports=encode_rdma_ports(told))
    assert decode_group_port(sent) == told


def test_what_macos_would_not_call_a_device_is_no_port_for_rdma() -> None:
    ports = [pb.RdmaPort(device=name, own="A", peer="B") for name in ("../en5", "rdma_en5", "")]
    assert decode_group_port(pb.MeasureSumsResponse(group_port=7, rdma_ports=ports)) == GroupPort(
        7, (RdmaPort("rdma_en5", "A", "B"),)
    )
    assert decode_group_port(pb.LoadStageResponse(group_port=65536, rdma_ports=ports)) is None


def test_a_group_over_rdma_needs_a_device_for_each_pair_of_ranks() -> None:
    request = pb.JoinGroupRequest(hosts=HOSTS, backend="jaccl")
    for rows in ((), (("", "rdma_en5"),), (("", "rdma_en5"), ("rdma_en4",)), (("", "rdma_en5"), ("../en4", ""))):
        del request.devices[:]
        request.devices.extend(pb.RdmaDevices(names=row) for row in rows)
        with pytest.raises(InvalidRequest, match="a device for each pair"):
            require_group_addresses(request)
    del request.devices[:]
    request.devices.extend(pb.RdmaDevices(names=row) for row in (("", "rdma_en5"), ("rdma_en4", "")))
    found = require_group_addresses(request)
    assert found == GroupAddresses(HOSTS, "jaccl", (("", "rdma_en5"), ("rdma_en4", "")))
    command = JoinGroup.of(3, 1, found)
    assert next(read(unpacker(), pack(command))) == command
    assert command.addresses == found


@pytest.mark.anyio
@pytest.mark.parametrize("named", [False, True])
async def test_an_engine_that_does_not_meet_the_others_in_time_is_killed(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may not be named, or may not be there: MLX waits for ever."""
    monkeypatch.setattr(group_joins, "GROUP_JOIN_S" if named else "GROUP_GATHER_S", 0.01)
    joins, engine = GroupJoins(), Engine(hangs=True)
    with pytest.raises(WorkerLost, match="the ranks of a group"):
        await join(joins, engine, named=named)
    assert engine.killed
    with pytest.raises(StaleEpoch):
        await joins.deliver(5, GroupAddresses(HOSTS, "ring"))


@pytest.mark.anyio
async def test_a_group_has_as_many_ranks_as_the_load_says() -> None:
    joins = GroupJoins()
    with pytest.raises(InvalidRequest, match="invalid rank 2"):
        await join(joins, Engine(), pb.LoadStageRequest(epoch=5, rank=2, ranks=2))
    with pytest.raises(InvalidRequest, match="2 addresses for 3 ranks"):
        await join(joins, Engine(), pb.LoadStageRequest(epoch=5, rank=2, ranks=3))


def test_links_that_others_can_reach_need_consent() -> None:
    """Also where a coordinator of another version, or a hostile one, has not asked for it."""
    inside = pb.JoinGroupRequest(hosts=HOSTS, backend="ring")
    assert require_group_addresses(inside) == GroupAddresses(HOSTS, "ring")
    outside = pb.JoinGroupRequest(hosts=(HOSTS[0], "192.168.1.7:7002"), backend="ring")
    with pytest.raises(InsecureGroup, match="--insecure-links"):
        require_group_addresses(outside)
    outside.insecure = True
    assert require_group_addresses(outside).hosts[1] == "192.168.1.7:7002"


@pytest.mark.parametrize(
    ("hosts", "backend"),
    [
        (HOSTS[:1], "ring"),
        (HOSTS * 5, "ring"),
        (HOSTS, "mpi"),
        (("mac:1", HOSTS[0]), "ring"),
        (("1", "2"), "ring"),
    ],
)
def test_addresses_that_are_none_are_refused(hosts: tuple[str, ...], backend: str) -> None:
    with pytest.raises(InvalidRequest):
        require_group_addresses(pb.JoinGroupRequest(hosts=hosts, backend=backend, insecure=True))


def test_a_held_port_is_for_mlx_alone() -> None:
    held = HeldPort("127.0.0.1")
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", held.number))
        with socket.socket() as ring:  # as MLX's own listens
            ring.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            ring.bind(("127.0.0.1", held.number))
            ring.listen()
            with socket.create_connection(("127.0.0.1", held.number), timeout=5), ring.accept()[0]:
                pass
    finally:
        held.close()
    with pytest.raises(PortInUse):
        HeldPort("192.0.2.1")


def test_rank_0_can_listen_on_its_held_port_for_nvidias_library() -> None:
    held = HeldPort("127.0.0.1", ("127.0.0.2",))
    try:
        with socket.socket() as nccl:  # MLX's: any address, and another option than the ring's
            nccl.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            nccl.bind(("", held.number))
            nccl.listen()
            with socket.create_connection(("127.0.0.1", held.number), timeout=5), nccl.accept()[0]:
                pass
    finally:
        held.close()


def test_a_port_is_held_on_all_addresses_of_a_mac_that_are_left() -> None:
    held = HeldPort("127.0.0.1", ("127.0.0.2", "192.0.2.1"))
    number = held.number
    try:
        for host in ("127.0.0.1", "127.0.0.2"):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((host, number))
    finally:
        held.close()
    with socket.create_server(("127.0.0.2", number)):
        pass
