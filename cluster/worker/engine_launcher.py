"""Start engine processes, and keep a second one ready that has imported everything, for when the first one dies.

Importing mlx and mlx-lm takes seconds, for which a crashed engine's requests would wait; a standby starts at once. The
module knows processes. The supervisor knows the messages to an engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

import anyio

from cluster.core.errors import WorkerLost
from cluster.core.limits import STANDBY_AFTER_S
from cluster.platform.process import isolated_environment
from cluster.worker.settings import WorkerSettings

log = logging.getLogger(__name__)

MLX_ENVIRONMENT: Final = {"MLX_ENABLE_CACHE_THRASHING_CHECK": "0", "MLX_CUDA_SDPA_CACHE_SIZE": "2048"}
"""What MLX reads in an engine, unless it is set already. Its CUDA backend prepares attention for each new length of a
chunk and of its context, keeps 256 of them, and by default raises an error at the 512th."""
ALLOCATOR_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2"}
"""What glibc's allocator reads in an engine, unless it is set already; other systems ignore it. By default, threads
share eight heaps per core, and each heap keeps the most that any thread ever needed in it: 140 MiB for a tokenizer of
120,000 tokens, which each load reads on a new thread. Two are enough, since Python's threads take turns anyway."""


def engine_command(settings: WorkerSettings, memory_limit: int | None) -> list[str]:
    """Return the command line of a worker's engines. ``memory_limit`` is in bytes; None leaves it to the device."""
    limit = [f"--memory-limit={memory_limit}"] if memory_limit else []
    disk = [f"--prefix-disk={settings.prefix_disk}"] if settings.prefix_disk else []
    slower = [f"--throttle={settings.throttle}"] if settings.throttle != 1.0 else []
    where = [f"--host={settings.host}", f"--port={settings.data_port}"]
    where += [f"--home={settings.home}", f"--cluster={settings.cluster}", f"--worker={settings.name}"]
    where += [f"--log-level={settings.log_level}", *(["--every-address"] if settings.every_address else [])]
    return [sys.executable, "-m", "cluster.worker.engine", *where, *limit, *disk, *slower]


class EngineLauncher:
    """Provides engine processes that wait for their ``Begin``: the standby that ``keep`` started, else a new one.

    They inherit the descriptors ``files``.
    """

    def __init__(self, command: Sequence[str], files: Collection[int] = ()) -> None:
        self._command, self._files = command, files
        self._waiting: Process | None = None
        self._taken = anyio.Event()

    @property
    def ready(self) -> bool:
        """Whether there is a standby, perhaps still importing."""
        return self._waiting is not None and self._waiting.returncode is None

    async def take(self) -> Process:
        """Return an engine process. A standby that has died meanwhile, for lack of memory, is not used.

        Raises ``WorkerLost`` if the system cannot start one.
        """
        process, self._waiting = self._waiting, None
        if process is not None:
            self._taken.set()
            if process.returncode is None:
                return process
        return await self._launch()

    async def keep(self) -> None:
        """Keep a standby until cancelled. The next one starts after the one taken had time to load its stage."""
        try:
            while True:
                taken = self._taken = anyio.Event()
                await anyio.sleep(STANDBY_AFTER_S)
                try:
                    self._waiting = await self._launch()
                except WorkerLost as e:  # the running engine does not need one
                    log.warning("standby: not started, trying again reason=%s", e.sentence)
                    continue
                await taken.wait()
        finally:
            process, self._waiting = self._waiting, None
            if process is not None:
                with anyio.CancelScope(shield=True), suppress(ProcessLookupError):
                    process.kill()
                    await process.wait()

    async def _launch(self) -> Process:
        """Start a process in a folder that cannot be deleted while the daemon runs.

        A cancelled caller gets it first, to end it: asyncio leaves the child and its pipes behind if a start is
        cancelled again and again, as anyio does.
        """
        environment = {**MLX_ENVIRONMENT, **ALLOCATOR_ENVIRONMENT, **isolated_environment(os.environ)}
        try:
            with anyio.CancelScope(shield=True):
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=PIPE,
                    env=environment,
                    cwd=os.sep,
                    pass_fds=self._files,
                )
        except OSError as e:  # too many files or processes, or too little memory: that may pass
            raise WorkerLost(f"cannot start the engine process: {e.strerror}; it is tried again") from e
        return process
