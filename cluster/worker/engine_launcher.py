"""The standby: a second engine process that has imported everything and touched nothing, for when the first one dies.

Importing mlx and mlx-lm takes seconds, in which a crashed engine's requests would wait; one in waiting begins at once.
It knows processes. What an engine is told, the supervisor knows.
"""

from __future__ import annotations

import asyncio
import logging
import os
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

import anyio

from cluster.core.errors import WorkerLost
from cluster.core.limits import STANDBY_AFTER_S
from cluster.platform.process import isolated_environment

log = logging.getLogger(__name__)


class EngineLauncher:
    """Hands out engine processes, which wait for their ``Begin``: the one that ``keep`` has ready, else a new one."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._waiting: Process | None = None
        self._taken = anyio.Event()

    @property
    def ready(self) -> bool:
        """Whether one is in waiting, perhaps still at its imports."""
        return self._waiting is not None and self._waiting.returncode is None

    async def take(self) -> Process:
        """An engine process. One in waiting that has died in the meantime, as memory ran out, is let go.

        Raises ``WorkerLost`` where the system starts none.
        """
        process, self._waiting = self._waiting, None
        if process is not None:
            self._taken.set()
            if process.returncode is None:
                return process
        return await self._launch()

    async def keep(self) -> None:
        """Have one in waiting, until cancelled; the next one once who was taken has had time to load its stage."""
        try:
            while True:
                taken = self._taken = anyio.Event()
                await anyio.sleep(STANDBY_AFTER_S)
                try:
                    self._waiting = await self._launch()
                except WorkerLost as e:  # the engine that computes needs none
                    log.warning("standby: not started, tried again reason=%s", e.sentence)
                    continue
                await taken.wait()
        finally:
            process, self._waiting = self._waiting, None
            if process is not None:
                with anyio.CancelScope(shield=True), suppress(ProcessLookupError):
                    process.kill()
                    await process.wait()

    async def _launch(self) -> Process:
        """A new process, in a folder that cannot be deleted while the daemon runs."""
        environment = isolated_environment(os.environ)
        try:
            return await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, cwd=os.sep
            )
        except OSError as e:  # too many files or processes, too little memory: that may pass
            raise WorkerLost(f"the engine could not be started: {e.strerror}") from e
