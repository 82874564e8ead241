"""Bring an engine into its group: hold a port for it, wait for the addresses of all ranks, and have it join them.

A load of one rank's part does this before anything is read, and so does a measurement of sums. It knows addresses and
deadlines; which workers form a group, the coordinator decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

import anyio
import anyio.to_thread

from cluster.core.errors import BadFrame, InsecureGroup, InvalidRequest, MacpipeError, StaleEpoch, WorkerLost
from cluster.core.group_limits import (
    DEVICES_JOIN_S,
    GROUP_BEGIN_S,
    GROUP_GATHER_S,
    GROUP_JOIN_S,
    MAX_HOST_CHARS,
    MAX_RANKS,
)
from cluster.core.process_groups import GroupAddresses, GroupPort, RdmaPort, is_rdma_device
from cluster.core.text import is_ip_address, parse_address
from cluster.membership.slowness import extra_s
from cluster.platform.overload import Lag, no_lag
from cluster.v1 import worker_pb2 as pb
from cluster.worker.pipe_messages import GroupPortHeld, HoldGroupPort, JoinGroup
from cluster.worker.supervisor import Supervisor

__all__ = ["GroupJoins", "require_group_addresses"]

BACKENDS = ("ring", "nccl", "jaccl")
"""MLX's backends for groups: TCP connections, NVIDIA's library between CUDA devices, and RDMA over Thunderbolt 5."""


@dataclass(frozen=True, slots=True)
class _Joining:
    """A load that waits for the addresses of its group; ``begun`` is set once its engine begins to meet the others."""

    addresses: asyncio.Future[GroupAddresses]
    begun: anyio.Event = field(default_factory=anyio.Event)


def require_group_addresses(request: pb.JoinGroupRequest) -> GroupAddresses:
    """Return where the ranks of a group are. Raises ``InvalidRequest``, and ``InsecureGroup`` if not all are loopback.

    The links of a group are neither authenticated nor encrypted, so other addresses need the operator's consent.
    """
    hosts = tuple(request.hosts)
    if not 2 <= len(hosts) <= MAX_RANKS or request.backend not in BACKENDS:
        why = f"a group has 2 to {MAX_RANKS} ranks, connected by {' or '.join(BACKENDS)}"
        raise InvalidRequest(why, field="hosts")
    if not all(len(host) <= MAX_HOST_CHARS and _is_address(host) for host in hosts):
        raise InvalidRequest("an address of a group is not an IP address and a port", field="hosts")
    if not request.insecure and not all(ip_address(parse_address(host)[0]).is_loopback for host in hosts):
        raise InsecureGroup(
            "the links of a group are neither authenticated nor encrypted; use --insecure-links if nobody else can "
            "reach the network between these Macs"
        )
    devices = tuple(tuple(row.names) for row in request.devices)
    if request.backend == "jaccl":
        _require_devices(devices, len(hosts))
    return GroupAddresses(hosts, request.backend, devices)


def _require_devices(devices: Sequence[Sequence[str]], count: int) -> None:
    square = len(devices) == count and all(len(row) == count for row in devices)
    if not square or not all(is_rdma_device(name) for row in devices for name in row if name):
        raise InvalidRequest("a group over RDMA needs the name of a device for each pair of ranks", field="devices")


def _is_address(host: str) -> bool:
    try:
        return is_ip_address(parse_address(host)[0])
    except MacpipeError:
        return False


class GroupJoins:
    """The engines of one worker that wait for the addresses of their group, by epoch. Lives on one event loop."""

    def __init__(self, lag: Lag = no_lag, find_rdma_ports: Callable[[], tuple[RdmaPort, ...]] = tuple) -> None:
        self._lag, self._find_rdma_ports = lag, find_rdma_ports
        self._waiting: dict[int, _Joining] = {}

    async def deliver(self, epoch: int, addresses: GroupAddresses) -> None:
        """Give the addresses to the engine that waits for them by this number. Return once it begins to meet.

        Returns, too, if that takes long or the engine fails. Raises ``StaleEpoch`` if none waits.
        """
        waiting = self._waiting.get(epoch)
        if waiting is None or waiting.addresses.done():
            raise StaleEpoch(f"no engine waits for the addresses of the group of epoch {epoch}")
        waiting.addresses.set_result(addresses)
        with anyio.move_on_after(GROUP_BEGIN_S):
            await waiting.begun.wait()

    async def join(self, supervisor: Supervisor, epoch: int, rank: int, ranks: int) -> AsyncGenerator[GroupPort, None]:
        """Bring a fresh engine into a group, and yield where it will listen meanwhile.

        ``epoch`` is that of the load, or another number by which ``deliver`` finds it.

        Raises ``WorkerLost`` if the addresses or the other ranks do not come in time. The engine is killed then.
        """
        if ranks > MAX_RANKS or rank >= ranks or epoch in self._waiting:
            why = f"invalid rank {rank} of a group of {ranks}; at most {MAX_RANKS} can share a stage"
            raise InvalidRequest(why, field="rank")
        waiting = self._waiting[epoch] = _Joining(asyncio.get_running_loop().create_future())
        try:
            held = await supervisor.ask(HoldGroupPort)
            if not isinstance(held, GroupPortHeld):
                raise BadFrame("the engine did not say which port it holds")
            rdma_ports = await anyio.to_thread.run_sync(self._find_rdma_ports) if held.rdma else ()
            yield GroupPort(held.port, rdma_ports)
            found = await self._wait(waiting.addresses, GROUP_GATHER_S, "were not named", supervisor)
            if len(found.hosts) != ranks:
                raise InvalidRequest(f"{len(found.hosts)} addresses for {ranks} ranks", field="hosts")
            limit_s = GROUP_JOIN_S if found.backend == "ring" else DEVICES_JOIN_S
            joining = asyncio.ensure_future(self._enter(supervisor, rank, found, waiting, limit_s))
            await self._wait(joining, limit_s, f"did not meet at {_in_words(found.hosts)}", supervisor)
        finally:
            del self._waiting[epoch]
            waiting.begun.set()

    async def _enter(
        self, supervisor: Supervisor, rank: int, found: GroupAddresses, waiting: _Joining, limit_s: float
    ) -> GroupAddresses:
        limit_s += extra_s(self._lag())
        with supervisor.silence():
            async for _ in supervisor.events(lambda call: JoinGroup.of(call, rank, found), limit_s):
                waiting.begun.set()
        return found

    async def _wait(
        self, what: asyncio.Future[GroupAddresses], limit_s: float, happened: str, supervisor: Supervisor
    ) -> GroupAddresses:
        try:
            async with asyncio.timeout(limit_s + extra_s(self._lag())):
                return await what
        except TimeoutError:
            supervisor.reset("the ranks of its group did not meet")
            raise WorkerLost(f"the ranks of a group {happened} within {limit_s:.0f} s") from None


def _in_words(hosts: Sequence[str]) -> str:
    return ", ".join(hosts)
