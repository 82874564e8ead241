"""Has this Mac examined for the coordinator, in a process of its own that can be killed: one at a time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Final

import anyio
from google.protobuf.message import DecodeError

from cluster.core.errors import Busy, MacpipeError
from cluster.core.examination import EXAMINE_S
from cluster.core.limits import MAX_ANSWER_BYTES, RETRY_AFTER_S
from cluster.platform.paths import HOME_VARIABLE
from cluster.sandbox.child_streams import start_child
from cluster.v1 import worker_pb2 as pb
from cluster.worker.examination_child import LENGTH

END_S: Final = 2.0
"""Seconds that the process may take to end after it was killed."""


class Examiner:
    """Examines the Mac whose state is in ``home``. A call waits until an earlier one has ended."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._running = anyio.Lock()

    async def examine(self, request: pb.ExamineRequest) -> pb.ExamineResponse:
        """Return what a process finds, which has ``EXAMINE_S`` for it and is killed if the call is cancelled.

        Raises ``Busy`` if it cannot be started or takes too long, and ``MacpipeError`` if it fails.
        """
        async with self._running:
            try:
                child, ours = start_child("cluster.worker.examination_child", {HOME_VARIABLE: str(self._home)})
            except OSError as error:
                raise Busy(
                    f"cannot start an examination: {error.strerror}; try again later", retry_after_s=RETRY_AFTER_S
                ) from error
            try:
                reader, writer = await asyncio.open_unix_connection(sock=ours)
            except BaseException:
                ours.close()
                await _kill(child)
                raise
            try:
                async with asyncio.timeout(EXAMINE_S):
                    return await _exchange(reader, writer, request)
            except TimeoutError:
                raise Busy(
                    f"this Mac is busy: its examination took more than {EXAMINE_S:.0f} s", retry_after_s=RETRY_AFTER_S
                ) from None
            except (OSError, EOFError, DecodeError) as error:
                raise MacpipeError("the process that examines this Mac ended without a result") from error
            finally:
                writer.transport.abort()
                await _kill(child)


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: pb.ExamineRequest
) -> pb.ExamineResponse:
    message = request.SerializeToString()
    writer.write(LENGTH.pack(len(message)) + message)
    await writer.drain()
    (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if size > MAX_ANSWER_BYTES:
        raise EOFError
    return pb.ExamineResponse.FromString(await reader.readexactly(size))


async def _kill(child: Popen[bytes]) -> None:
    child.kill()
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(_reap, child)


def _reap(child: Popen[bytes]) -> None:
    with suppress(TimeoutExpired):
        child.wait(END_S)
