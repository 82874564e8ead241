"""Controls a child process from its parent: starts it, exchanges messages over its socket, and ends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from subprocess import Popen, TimeoutExpired
from typing import Final

import anyio

from cluster.core.errors import Busy
from cluster.core.limits import MIB, RETRY_AFTER_S
from cluster.sandbox.child_streams import start_child

__all__ = ["ChildProcess"]

END_S: Final = 2.0
"""Seconds that a process may take to end after it was killed or has closed its socket."""
LENGTH_BYTES: Final = 4
"""Bytes before each message, which give its length."""


class ChildProcess:
    """A process and the socket that is its stdin and stdout.

    It does not use asyncio's subprocesses: asyncio waits forever if a start is cancelled, or if a process is killed
    whose output is only partly read.
    """

    def __init__(self, process: Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @staticmethod
    async def start(
        module: str, environment: Mapping[str, str], what: str, *, stderr: int | None = None
    ) -> ChildProcess:
        """Start ``python -m module``, as ``start_child`` does. A message that is sent while it imports waits.

        Raises ``Busy``, which says ``what`` cannot be started, if this machine cannot start another process.
        """
        try:
            process, ours = start_child(module, environment, stderr)
        except OSError as error:
            raise Busy(
                f"cannot start {what}: {error.strerror}; try again later", retry_after_s=RETRY_AFTER_S
            ) from error
        try:
            return ChildProcess(process, *await asyncio.open_unix_connection(sock=ours, limit=MIB))
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise

    @property
    def pid(self) -> int:
        """Return the id of the process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Return whether the process has not ended yet."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Return the exit code, once the end was noticed by ``running``, ``wait`` or ``end``; else None."""
        return self._process.returncode

    async def send(self, message: bytes) -> None:
        """Send a message. Raises OSError once the process has ended."""
        self._writer.write(message)
        await self._writer.drain()

    async def receive(self, payload_size: Callable[[bytes], int]) -> bytes:
        """Return the next message's payload; ``payload_size`` reads its length of ``LENGTH_BYTES`` and checks it.

        Raises OSError or EOFError once the process has ended.
        """
        return await self._reader.readexactly(payload_size(await self._reader.readexactly(LENGTH_BYTES)))

    async def wait(self) -> int | None:
        """Wait up to ``END_S`` for the process, which was killed or has closed its socket. Return its exit code."""
        await anyio.to_thread.run_sync(self._reap)
        return self.exit_code

    def kill(self) -> None:
        """Kill the process. What it wrote before can still be received."""
        self._process.kill()

    async def end(self) -> None:
        """Kill the process, close the socket, and wait up to ``END_S`` for its end."""
        self.kill()
        self._writer.transport.abort()
        await self.wait()

    def _reap(self) -> None:
        """Wait up to ``END_S``. On an overloaded machine that may be too short: a thread then waits for the rest."""
        try:
            self._process.wait(END_S)
        except TimeoutExpired:
            threading.Thread(target=self._process.wait, name="reap", daemon=True).start()
