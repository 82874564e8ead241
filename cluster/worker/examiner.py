"""Has this Mac examined for the coordinator, in a process of its own that can be killed: one at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio
from google.protobuf.message import DecodeError

from cluster.core.errors import Busy, MacpipeError
from cluster.core.examination import EXAMINE_S
from cluster.core.limits import MAX_ANSWER_BYTES, RETRY_AFTER_S
from cluster.platform.paths import HOME_VARIABLE
from cluster.sandbox.child_process import ChildProcess
from cluster.v1 import worker_pb2 as pb
from cluster.worker.examination_child import LENGTH


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
            environment = {HOME_VARIABLE: str(self._home)}
            child = await ChildProcess.start("cluster.worker.examination_child", environment, "an examination")
            try:
                async with asyncio.timeout(EXAMINE_S):
                    return await _exchange(child, request)
            except TimeoutError:
                raise Busy(
                    f"this Mac is busy: its examination took more than {EXAMINE_S:.0f} s", retry_after_s=RETRY_AFTER_S
                ) from None
            except (OSError, EOFError, DecodeError) as error:
                raise MacpipeError("the process that examines this Mac ended without a result") from error
            finally:
                with anyio.CancelScope(shield=True):
                    await child.end()


async def _exchange(child: ChildProcess, request: pb.ExamineRequest) -> pb.ExamineResponse:
    message = request.SerializeToString()
    await child.send(LENGTH.pack(len(message)) + message)
    return pb.ExamineResponse.FromString(await child.receive(_payload_size))


def _payload_size(header: bytes) -> int:
    (size,) = LENGTH.unpack(header)
    if size > MAX_ANSWER_BYTES:
        raise EOFError
    return int(size)
