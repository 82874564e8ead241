"""Makes this process a rank of a group with MLX's own collectives. MLX has no way out of a group: it ends with it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from cluster.core.errors import MacpipeError, ModelUnsupported, RankFailed, WorkerLost
from cluster.core.process_groups import GroupAddresses
from cluster.model.sharding import Group

__all__ = [
    "Lockstep",
    "as_rank",
    "group_environment",
    "has_rdma",
    "join_group",
    "require_nccl",
    "settle_sums",
    "tabulate_peers",
]


def has_rdma() -> bool:
    """Return whether this MLX can connect groups by RDMA, on macOS 26.2 and later."""
    return bool(mx.distributed.is_available("jaccl"))


def join_group(rank: int, found: GroupAddresses) -> Group:
    """Return the group of the processes at these addresses, of which this one is number ``rank``, once all have met.

    It waits without a limit: whoever calls it has to end a process that waits too long. Raises ModelUnsupported if this
    MLX has no such backend or cannot use it here, and WorkerLost if the others cannot be reached.
    """
    hosts, backend = found.hosts, found.backend
    if not mx.distributed.is_available(backend):
        raise ModelUnsupported(f"MLX has no {backend} backend on this machine; install a build of MLX that has it")
    if backend == "nccl":
        require_nccl(rank, hosts, mx.device_count(mx.gpu))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(tabulate_peers(found), file)
        file.flush()
        os.environ |= {"MLX_RANK": str(rank), **group_environment(found, file.name)}
        try:
            group: Group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            raise WorkerLost(f"this rank could not reach the others of its group: {error}") from error
    if (group.rank(), group.size()) != (rank, len(hosts)):
        raise MacpipeError(f"MLX made a group of {group.size()} processes, not of {len(hosts)}")
    return group


def require_nccl(rank: int, hosts: Sequence[str], gpus: int) -> None:
    """Raise ModelUnsupported unless NVIDIA's library can connect ranks from a process that sees this many GPUs.

    An engine computes on its first GPU, but MLX connects the GPU whose number is the rank, if there are so many. And it
    looks for rank 0 by an IPv4 address.
    """
    if gpus > 1 and rank % gpus:
        raise ModelUnsupported(
            f"the engine of rank {rank} sees {gpus} GPUs, and would compute on one and send from another; "
            "start its worker with CUDA_VISIBLE_DEVICES set to one GPU"
        )
    if ":" in hosts[0].rpartition(":")[0]:
        raise ModelUnsupported(f"MLX connects GPUs by IPv4 alone, and rank 0 is at {hosts[0]}; give its worker --host")


class Lockstep:
    """Keeps the ranks of a group in step: before each step all meet, and compare what they computed in the last one.

    Metal ends a GPU's work that waits for a late rank, so they wait for each other on the CPU. NVIDIA's library has no
    collectives of the CPU, and CUDA no such limit: there, nobody waits and nothing is compared.
    """

    def __init__(self, group: Group) -> None:
        self._group, self._meets = group, not mx.cuda.is_available()
        self.noted = mx.zeros((), mx.uint32)
        """Sum of the bits of what this rank has computed since they met, to be evaluated with the step."""

    def note(self, arrays: Iterable[mx.array]) -> None:
        """Count the bits of arrays that all ranks must have alike. They may be yet to be evaluated."""
        for array in arrays if self._meets else ():
            words = array.reshape(-1).view(_WORDS[array.dtype.size])
            self.noted = self.noted + words.astype(mx.uint32).sum()

    def meet(self) -> None:
        """Wait until all ranks are here. Raises RankFailed if they have noted different bits."""
        if not self._meets:
            return
        noted, self.noted = self.noted.reshape(1), mx.zeros((), mx.uint32)
        with as_rank(self._group):
            seen = mx.distributed.all_gather(noted, group=self._group, stream=mx.cpu)  # type: ignore[arg-type]
            sums: Any = seen.tolist()
        if differing := [rank for rank, own in enumerate(sums) if own != sums[0]]:
            count = self._group.size()
            raise RankFailed(f"rank {differing[0]} of {count} computed other numbers than rank 0 in the last step")


_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
"""Types for the bits of numbers, by their bytes."""


@contextmanager
def settle_sums() -> Iterator[None]:
    """Inside the block, evaluate what ranks exchange before the exchange, and its result right after it.

    A GPU then never waits for a rank that is late with a long prompt: the CPU does. What a model compiles is exchanged
    as without the block, and so is all on CUDA, which lets its GPUs wait.
    """
    if mx.cuda.is_available():
        yield
        return
    module: Any = mx.distributed
    original = module.all_sum, module.all_gather
    module.all_sum, module.all_gather = map(_settled, original)
    try:
        yield
    finally:
        module.all_sum, module.all_gather = original


def _settled(exchange: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def exchange_now(array: mx.array, **options: Any) -> mx.array:
        try:
            mx.eval(array)
        except ValueError:  # inside mx.compile there is nothing to evaluate yet
            return exchange(array, **options)
        result = exchange(array, **options)
        mx.eval(result)
        return result

    return exchange_now


def tabulate_peers(found: GroupAddresses) -> list[list[str | None]]:
    """Return the content of the file that a backend reads: each rank's addresses, or its device towards each rank."""
    if found.backend == "jaccl":
        return [[name or None for name in row] for row in found.devices]
    return [[host] for host in found.hosts]


def group_environment(found: GroupAddresses, file: str) -> dict[str, str]:
    """Return what a backend reads from the environment beside the rank, with the path of the file.

    Over RDMA, rank 0 listens for the others, which tell each other there how their devices are reached. Without a cable
    between each two Macs, they form a ring.
    """
    hosts = found.hosts
    if found.backend == "ring":
        return {"MLX_HOSTFILE": file}
    if found.backend == "jaccl":
        gaps = any(not name for i, row in enumerate(found.devices) for j, name in enumerate(row) if i != j)
        ring = {"MLX_JACCL_RING": "1"} if gaps else {}
        return {"MLX_IBV_DEVICES": file, "MLX_JACCL_COORDINATOR": hosts[0], **ring}
    host, _, port = hosts[0].rpartition(":")
    # NCCL's multicast over NVLink needs rights that a worker may not have.
    return {"NCCL_HOST_IP": host, "NCCL_PORT": port, "MLX_WORLD_SIZE": str(len(hosts)), "NCCL_NVLS_ENABLE": "0"}


@contextmanager
def as_rank(group: Group | None) -> Iterator[None]:
    """Raise RankFailed for whatever fails inside the block, if there is a group: the ranks are no longer in step."""
    try:
        yield
    except Exception as error:
        if group is None:
            raise
        what = f"{type(error).__name__}: {error}"
        raise RankFailed(f"rank {group.rank()} of {group.size()} could not do a step: {what}") from error
