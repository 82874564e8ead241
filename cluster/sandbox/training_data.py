"""Controls the process that reads training data and makes batches of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from subprocess import DEVNULL
from typing import Final

import anyio

from cluster.core.errors import DeadlineExceeded, InvalidRequest, MacpipeError
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import DataBatch
from cluster.core.training_limits import DATA_MEMORY_BYTES, DATA_TIMEOUT_S, DATA_WATCH_S
from cluster.platform.process import resident_bytes
from cluster.sandbox.child_process import ChildProcess
from cluster.sandbox.training_messages import DataFailed, DataReady, Made, pack_request, payload_size, unpack

__all__ = ["TrainingData"]

SETTINGS: Final = {"TOKENIZERS_PARALLELISM": "true"}


class TrainingData:
    """The batches of one run, in order. ``cut`` sequences are too long, the longest has ``longest`` tokens.

    Close it to end the process.
    """

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._watch = asyncio.create_task(self._watch_memory())
        self._too_large = False
        self.cut = self.longest = 0

    @staticmethod
    async def open(folder: Path, tokenizer_folder: Path, options: TrainingOptions) -> TrainingData:
        """Start the process and wait until it has tokenized the data in ``folder``.

        Raises InvalidRequest, which names file and line, BadCheckpoint for an unusable tokenizer, and Busy.
        """
        data = TrainingData(
            await ChildProcess.start(
                "cluster.sandbox.training_child", SETTINGS, "the process that makes batches", stderr=DEVNULL
            )
        )
        try:
            first = await data._read(pack_request(str(folder), str(tokenizer_folder), options.to_json()))
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
        await self._child.end()

    async def _read(self, request: bytes = b"") -> Made | None:
        try:
            async with asyncio.timeout(DATA_TIMEOUT_S):
                await self._child.send(request)
                made = unpack(await self._child.receive(payload_size))
        except (asyncio.IncompleteReadError, ConnectionError):
            if await self._child.wait() == 0:
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
