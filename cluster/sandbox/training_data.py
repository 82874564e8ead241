"""Controls the process that reads training data and makes batches of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Final

import anyio

from cluster.core.errors import Busy, DeadlineExceeded, InvalidRequest, MacpipeError
from cluster.core.limits import MIB, RETRY_AFTER_S
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import DataBatch
from cluster.core.training_limits import DATA_MEMORY_BYTES, DATA_TIMEOUT_S, DATA_WATCH_S
from cluster.platform.process import resident_bytes
from cluster.sandbox.child_streams import start_child
from cluster.sandbox.training_messages import HEADER, DataFailed, DataReady, Made, pack_request, payload_size, unpack

__all__ = ["TrainingData"]

SETTINGS: Final = {"TOKENIZERS_PARALLELISM": "true"}
END_S: Final = 2.0
"""Seconds that the process may take to end after it was killed or has written everything."""


class TrainingData:
    """The batches of one run, in order. ``cut`` sequences are too long, the longest has ``longest`` tokens.

    Close it to end the process. As ``SandboxProcess``, it does not use asyncio's subprocesses: asyncio waits forever
    for a killed process whose output is only partly read.
    """

    def __init__(self, child: Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._child, self._reader, self._writer = child, reader, writer
        self._watch = asyncio.create_task(self._watch_memory())
        self._too_large = False
        self.cut = self.longest = 0

    @staticmethod
    async def open(folder: Path, tokenizer_folder: Path, options: TrainingOptions) -> TrainingData:
        """Start the process and wait until it has tokenized the data in ``folder``.

        Raises InvalidRequest, which names file and line, BadCheckpoint for an unusable tokenizer, and Busy.
        """
        try:
            child, ours = start_child("cluster.sandbox.training_child", SETTINGS, DEVNULL)
        except OSError as error:
            raise Busy(
                f"cannot start the process that makes batches: {error.strerror}; try again later",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        try:
            data = TrainingData(child, *await asyncio.open_unix_connection(sock=ours, limit=MIB))
        except BaseException:
            child.kill()
            child.wait()
            ours.close()
            raise
        try:
            data._writer.write(pack_request(str(folder), str(tokenizer_folder), options.to_json()))
            first = await data._read()
            if isinstance(first, DataReady):
                data.cut, data.longest = first.cut, first.longest
        except BaseException:
            with anyio.CancelScope(shield=True):
                await data.close()
            raise
        return data

    async def next(self) -> DataBatch | None:
        """Return the next batch; None after the last. Raises the errors of ``open``, and DeadlineExceeded."""
        made = await self._read()
        return made if isinstance(made, DataBatch) else None

    async def close(self) -> None:
        """Kill the process."""
        self._watch.cancel()
        self._child.kill()
        self._writer.transport.abort()
        await anyio.to_thread.run_sync(self._reap)

    def _reap(self) -> int | None:
        """Wait up to ``END_S`` for the end of the process, and return its exit code."""
        with suppress(TimeoutExpired):
            self._child.wait(END_S)
        return self._child.returncode

    async def _read(self) -> Made | None:
        try:
            async with asyncio.timeout(DATA_TIMEOUT_S):
                header = await self._reader.readexactly(HEADER.size)
                made = unpack(await self._reader.readexactly(payload_size(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            if await anyio.to_thread.run_sync(self._reap) == 0:
                return None
            memory = f"needs more than {DATA_MEMORY_BYTES >> 30} GiB of memory"
            why = memory if self._too_large else "makes a library fail"
            raise InvalidRequest(f"the training data {why}; use less data", field="data") from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"the training data was not tokenized within {DATA_TIMEOUT_S:.0f} s; use less data"
            ) from None
        if isinstance(made, DataFailed):
            raise MacpipeError.of(made.reason, made.sentence)
        return made

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(DATA_WATCH_S)
            if await anyio.to_thread.run_sync(resident_bytes, self._child.pid) > DATA_MEMORY_BYTES:
                self._too_large = True
                self._child.kill()
                return
