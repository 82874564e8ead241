"""Runs mlx-lm in one process for each rank of a group, sharded by mlx-lm itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from single_process import SingleProcess
from throughput import at_once

from cluster.cli.process_group import reserve_port


class ShardedProcesses:
    """Ranks on this machine, one for each of ``environments``, over ``backend``: MLX's ring or nccl.

    Times are in seconds. ``stack`` closes the processes.
    """

    def __init__(
        self, stack: ExitStack, model: Path, folder: Path, environments: Sequence[Mapping[str, str]], backend: str
    ) -> None:
        ports = [stack.enter_context(reserve_port("127.0.0.1")) for _ in environments]
        file = folder / "hosts.json"
        file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        met = {"MLX_HOSTFILE": str(file)}
        if backend == "nccl":
            size = str(len(ports))
            met = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": size}
            met["NCCL_NVLS_ENABLE"] = "0"
        self._ranks = []
        for rank, environment in enumerate(environments):
            own = {**environment, **met, "MLX_RANK": str(rank), "BENCH_BACKEND": backend}
            self._ranks.append(SingleProcess(model, core=None, environment=own))
            stack.callback(self._ranks[-1].close)

    def prefill(self, prompt: int) -> float:
        """Return the time from a prompt to its first token."""
        return max(at_once(self._ranks, lambda rank: rank.prefill(prompt)))

    def decode(self, prompt: int, tokens: int) -> float:
        """Decode ``tokens`` for one user. Return seconds without the first one."""
        return max(at_once(self._ranks, lambda rank: rank.decode(prompt, tokens)))

    def sum_s(self, count: int, nbytes: int) -> float:
        """Return the seconds of one sum of ``nbytes`` over all ranks, in a chain of ``count``."""
        return max(at_once(self._ranks, lambda rank: rank.sum_s(count, nbytes)))
