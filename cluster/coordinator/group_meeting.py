"""Let the ranks of a group find each other while their slices load: collect where they listen, then tell all of them.

It knows addresses. The workers open the ports and join the group.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import WorkerLost
from cluster.core.group_limits import GROUP_GATHER_S, GROUP_LISTEN_S
from cluster.core.plan import PlannedStage
from cluster.core.text import format_address, parse_address
from cluster.core.worker import WorkerInfo
from cluster.placement.groups import group_name

__all__ = ["GroupMeeting", "arrange_meetings", "choose_backend", "is_accepted"]

CUDA = "cuda"
"""Devices of workers whose groups NVIDIA's library connects; all others use TCP."""


@dataclass(eq=False)
class GroupMeeting:
    """One group that is about to form. ``insecure``: its links may be neither authenticated nor encrypted.

    ``number`` is the epoch by which the workers know it, or a random number that stands in for one.
    """

    workers: tuple[str, ...]
    backend: str
    insecure: bool
    number: int
    _hosts: dict[int, str] = field(default_factory=dict)
    _complete: anyio.Event = field(default_factory=anyio.Event)
    _meeting: set[int] = field(default_factory=set)
    """The ranks that have begun to meet."""
    _all_but_last: anyio.Event = field(default_factory=anyio.Event)

    async def attend(self, rank: int, control: WorkerClient, port: int) -> None:
        """Note where one rank listens, and tell it of the others once all are known: the last rank after all others.

        Raises ``WorkerLost`` if one is missing for too long, and the errors of the worker.
        """
        self._hosts[rank] = await _locate(control.address, port)
        if len(self._hosts) == len(self.workers):
            self._complete.set()
        try:
            async with asyncio.timeout(GROUP_GATHER_S):
                await self._complete.wait()
        except TimeoutError:
            missing = [name for rank, name in enumerate(self.workers) if rank not in self._hosts]
            why = f"worker {missing[0]} did not come to the group {group_name(self.workers)} in time"
            raise WorkerLost(why, worker=missing[0]) from None
        hosts = [self._hosts[rank] for rank in range(len(self.workers))]
        if rank == len(self.workers) - 1:
            await self._all_but_last.wait()  # their calls have deadlines, and one that fails ends this load, too
            await anyio.sleep(GROUP_LISTEN_S)
        await control.join_group(self.number, hosts, self.backend, insecure=self.insecure)
        self._meeting.add(rank)
        if len(self._meeting) == len(self.workers) - 1:
            self._all_but_last.set()


async def _locate(control_address: str, port: int) -> str:
    """Return the IP address and port of a rank, whose worker has this control address."""
    host, _ = parse_address(control_address)
    found = await anyio.to_thread.run_sync(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return format_address(str(found[0][4][0]), port)


def arrange_meetings(
    stages: Sequence[PlannedStage], workers: Sequence[WorkerInfo], insecure_links: Collection[Sequence[str]]
) -> dict[int, GroupMeeting]:
    """Return a meeting for each stage that is a group, by the stage's index. ``workers`` are those of ``stages``."""
    found: dict[int, GroupMeeting] = {}
    for index in {stage.spec.index for stage in stages if stage.spec.ranks > 1}:
        ranks = [(s, w) for s, w in zip(stages, workers, strict=True) if s.spec.index == index]
        names = tuple(stage.worker for stage, _ in ranks)
        backend = choose_backend([worker for _, worker in ranks])
        found[index] = GroupMeeting(names, backend, is_accepted(names, insecure_links), ranks[0][0].spec.epoch)
    return found


def choose_backend(workers: Sequence[WorkerInfo]) -> str:
    """Return which of MLX's backends connects these workers."""
    return "nccl" if all(worker.backend == CUDA for worker in workers) else "ring"


def is_accepted(group: Sequence[str], insecure_links: Collection[Sequence[str]]) -> bool:
    """Return whether the operator accepts insecure links between these workers."""
    return any(set(group) <= set(names) for names in insecure_links)
