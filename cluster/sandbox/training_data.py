"""Controls the process that reads training data and makes batches of it."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path

import anyio

from cluster.core.errors import Busy, DeadlineExceeded, InvalidRequest, MacpipeError
from cluster.core.limits import MIB, RETRY_AFTER_S
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import DataBatch
from cluster.core.training_limits import DATA_MEMORY_BYTES, DATA_TIMEOUT_S, DATA_WATCH_S
from cluster.platform.process import isolated_environment, resident_bytes
from cluster.sandbox.training_messages import HEADER, DataFailed, DataReady, Made, pack_request, payload_size, unpack

__all__ = ["TrainingData"]


class TrainingData:
    """The batches of one run, in order. ``cut`` sequences are too long, the longest has ``longest`` tokens.

    Close it to end the process.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._watch = asyncio.create_task(self._watch_memory())
        self._too_large = False
        self.cut = self.longest = 0

    @staticmethod
    async def open(folder: Path, tokenizer_folder: Path, options: TrainingOptions) -> TrainingData:
        """Start the process and wait until it has tokenized the data in ``folder``.

        Raises InvalidRequest, which names file and line, BadCheckpoint for an unusable tokenizer, and Busy.
        """
        command = (sys.executable, "-m", "cluster.sandbox.training_child")
        environment = {**isolated_environment(os.environ), "TOKENIZERS_PARALLELISM": "true"}
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, limit=MIB
            )
        except OSError as error:
            raise Busy(f"cannot start the process that makes batches: {error.strerror}; try again later",
                       retry_after_s=RETRY_AFTER_S) from error  # fmt: skip
        data = TrainingData(process)
        try:
            assert process.stdin
            process.stdin.write(pack_request(str(folder), str(tokenizer_folder), options.to_json()))
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
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _read(self) -> Made | None:
        assert self._process.stdout
        try:
            async with asyncio.timeout(DATA_TIMEOUT_S):
                header = await self._process.stdout.readexactly(HEADER.size)
                made = unpack(await self._process.stdout.readexactly(payload_size(header)))
        except asyncio.IncompleteReadError as error:
            if not error.partial and await self._process.wait() == 0:
                return None
            why = (
                f"needs more than {DATA_MEMORY_BYTES >> 30} GiB of memory"
                if self._too_large
                else "makes a library fail"
            )
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
            if await anyio.to_thread.run_sync(resident_bytes, self._process.pid) > DATA_MEMORY_BYTES:
                self._too_large = True
                self._process.kill()
                return
