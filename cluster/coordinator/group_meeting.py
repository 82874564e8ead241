"""Let the ranks of a group find each other while their slices load: collect where they listen, then tell all of them.

It knows addresses and devices. The workers open the ports and join the group.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from cluster.coordinator.rdma_devices import match_devices
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.group_limits import GROUP_GATHER_S, GROUP_LISTEN_S
from cluster.core.plan import PlannedStage
from cluster.core.process_groups import GroupAddresses, GroupPort
from cluster.core.text import format_address, parse_address
from cluster.core.worker import WorkerInfo
from cluster.placement.groups import group_name

__all__ = ["GroupMeeting", "arrange_meetings", "is_accepted"]

log = logging.getLogger(__name__)

CUDA = "cuda"
"""Devices of workers whose groups NVIDIA's library connects; all others use RDMA where they can, else TCP."""


@dataclass(eq=False)
class GroupMeeting:
    """One group that is about to form. ``insecure``: its links may be neither authenticated nor encrypted.

    ``number`` is the epoch by which the workers know it, or a random number that stands in for one.
    """

    workers: tuple[WorkerInfo, ...]
    insecure: bool
    number: int
    _ports: dict[int, GroupPort] = field(default_factory=dict)
    _hosts: dict[int, str] = field(default_factory=dict)
    _listening: anyio.Event = field(default_factory=anyio.Event)
    _located: anyio.Event = field(default_factory=anyio.Event)
    _meeting: set[int] = field(default_factory=set)
    """The ranks that have begun to meet."""
    _all_but_last: anyio.Event = field(default_factory=anyio.Event)

    @property
    def names(self) -> tuple[str, ...]:
        """The workers' names, by rank."""
        return tuple(worker.name for worker in self.workers)

    async def attend(self, rank: int, control: WorkerClient, port: GroupPort) -> None:
        """Note where one rank listens, and tell it of the others once all are known: the last rank after all others.

        Raises ``WorkerLost`` if one is missing for too long, and the errors of the worker.
        """
        self._ports[rank] = port
        if len(self._ports) == len(self.workers):
            self._listening.set()
        try:
            async with asyncio.timeout(GROUP_GATHER_S):
                await self._listening.wait()
                await self._locate_next(rank, control)
                await self._located.wait()
        except TimeoutError:
            present = self._hosts if self._listening.is_set() else self._ports
            missing = next((name for rank, name in enumerate(self.names) if rank not in present), self.names[0])
            why = f"worker {missing} did not come to the group {group_name(self.names)} in time"
            raise WorkerLost(why, worker=missing) from None
        if rank == len(self.workers) - 1:
            await self._all_but_last.wait()  # their calls have deadlines, and one that fails ends this load, too
            await anyio.sleep(GROUP_LISTEN_S)
        hosts = tuple(self._hosts[one] for one in range(len(self.workers)))
        found = GroupAddresses(hosts, *self._choose_backend())
        await control.join_group(self.number, found, insecure=self.insecure)
        log.info("group: told a rank worker=%s backend=%s hosts=%s", self.names[rank], found.backend, ",".join(hosts))
        self._meeting.add(rank)
        if len(self._meeting) == len(self.workers) - 1:
            self._all_but_last.set()

    async def _locate_next(self, rank: int, control: WorkerClient) -> None:
        """Find out where the rank after this one is reached. In a ring this one connects to it, over the best link.

        Other backends only meet at an address, that of rank 0, which all ranks must reach: a cable leads to one.
        """
        after = (rank + 1) % len(self.workers)
        backend, _ = self._choose_backend()
        before = control if backend == "ring" else None
        self._hosts[after] = await _locate(self.workers[after], self._ports[after].number, before)
        if len(self._hosts) == len(self.workers):
            self._located.set()

    def _choose_backend(self) -> tuple[str, tuple[tuple[str, ...], ...]]:
        """Return which of MLX's backends connects the ranks, and their devices towards each other if that is RDMA."""
        if all(worker.backend == CUDA for worker in self.workers):
            return "nccl", ()
        devices = match_devices([self._ports[rank].rdma_ports for rank in range(len(self.workers))])
        return ("jaccl" if devices else "ring"), devices


async def _locate(worker: WorkerInfo, port: int, before: WorkerClient | None) -> str:
    """Return the IP address and port of a rank: its usual one, or the one that the rank ``before`` it reaches best."""
    address = worker.control_address
    if before and worker.data_hosts:
        try:
            address = (await before.measure_link(worker)).address or address
        except MacpipeError as e:
            log.warning("group: no link measured, so the usual address is used reason=%s", e.sentence)
    host, _ = parse_address(address)
    found = await anyio.to_thread.run_sync(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return format_address(str(found[0][4][0]), port)


def arrange_meetings(
    stages: Sequence[PlannedStage], workers: Sequence[WorkerInfo], insecure_links: Collection[Sequence[str]]
) -> dict[int, GroupMeeting]:
    """Return a meeting for each stage that is a group, by the stage's index. ``workers`` are those of ``stages``."""
    found: dict[int, GroupMeeting] = {}
    for index in {stage.spec.index for stage in stages if stage.spec.ranks > 1}:
        ranks = [(s, w) for s, w in zip(stages, workers, strict=True) if s.spec.index == index]
        members = tuple(worker for _, worker in ranks)
        accepted = is_accepted([worker.name for worker in members], insecure_links)
        found[index] = GroupMeeting(members, accepted, ranks[0][0].spec.epoch)
    return found


def is_accepted(group: Sequence[str], insecure_links: Collection[Sequence[str]]) -> bool:
    """Return whether the operator accepts insecure links between these workers."""
    return any(set(group) <= set(names) for names in insecure_links)
