"""The coordinator's streams to stages that train: commands to each of them, and their replies in one queue.

Every value that crosses a cut passes the coordinator, so it feeds and pulls every stage. It lives on one event loop;
the streams' threads only pass messages on.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import anyio

from cluster.coordinator.ring import RingStage, feed_stage, pull_stage
from cluster.core.errors import BadFrame, MacpipeError, StageFailed, WorkerLost
from cluster.core.frames import Tensor
from cluster.core.training_frames import Task, TrainingCommand, TrainingReply, split_state
from cluster.core.training_limits import (
    MAX_STATE_BYTES,
    PREPARE_TIMEOUT_S,
    STEP_FACTOR,
    STEP_FLOOR_S,
)
from cluster.transport.streams import Dialer, Sender, Subscription
from cluster.wire.training_codec import decode_reply, encode_command

__all__ = ["TrainingStages"]


class TrainingStages:
    """The stages of one epoch. ``peaks`` are the peak bytes of each worker, by name."""

    def __init__(self, epoch: int, stages: Sequence[RingStage]) -> None:
        self._epoch, self._stages = epoch, stages
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, bytes] | MacpipeError] = asyncio.Queue()  # one per command, and losses
        self._senders: list[Sender] = []
        self._subscriptions: list[Subscription] = []
        self._sent = [0] * len(stages)
        self._waiting: list[deque[tuple[int, float]]] = [deque() for _ in stages]
        """Number and time of the commands without a reply, by stage."""
        self._longest_s = 0.0
        self.peaks: dict[str, int] = {}

    async def open(self, dialer: Dialer) -> None:
        """Open the streams. Raises ``Unreachable`` or ``StaleEpoch``."""
        await anyio.to_thread.run_sync(self._open, dialer)

    def _open(self, dialer: Dialer) -> None:
        for i, stage in enumerate(self._stages):
            self._subscriptions.append(
                pull_stage(dialer, self._epoch, stage, partial(self._on_message, i), self._on_lost)
            )
            self._senders.append(feed_stage(dialer, self._epoch, stage, self._on_lost))

    def close(self) -> None:
        """Close the streams."""
        for stream in (*self._senders, *self._subscriptions):
            stream.close()

    def fail(self, error: MacpipeError) -> None:
        """Have the next read raise ``error``."""
        self._arrived.put_nowait(error)

    def send(self, stage: int, command: Callable[[int, int], TrainingCommand]) -> None:
        """Send a command, made from its epoch and number. Raises ``BadFrame`` if it is too long."""
        number = self._sent[stage] = self._sent[stage] + 1
        message = encode_command(command(self._epoch, number))
        self._waiting[stage].append((number, time.monotonic()))
        self._senders[stage].send(message)

    async def read(self, timeout_s: float = 0.0) -> tuple[int, TrainingReply]:
        """Return the next reply and its stage.

        Raises the stage's own error, ``WorkerLost`` if a stage is lost or does not reply in time, and ``BadFrame``.
        """
        limit_s = max(timeout_s, STEP_FLOOR_S, STEP_FACTOR * self._longest_s)
        try:
            async with asyncio.timeout(limit_s):
                arrived = await self._arrived.get()
        except TimeoutError:
            late = next(self._stages[i].worker for i, waiting in enumerate(self._waiting) if waiting)
            raise WorkerLost(
                f"worker {late} has not finished a training step in {limit_s:.0f} s", worker=late
            ) from None
        if isinstance(arrived, MacpipeError):
            raise arrived
        return arrived[0], self._check(*arrived)

    def _check(self, index: int, message: bytes) -> TrainingReply:
        worker = self._stages[index].worker
        reply = decode_reply(message)
        number, sent_at = self._waiting[index].popleft() if self._waiting[index] else (0, 0.0)
        if reply.epoch != self._epoch or reply.number != number:
            raise BadFrame(f"worker {worker} replies to command {reply.number}, but {number} is the next")
        if reply.error:
            error = MacpipeError.of(reply.error.reason, reply.error.sentence)
            error.details["worker"] = worker
            if isinstance(error, StageFailed):
                error.sentence = f"worker {worker}: {error.sentence}"
            raise error
        self._longest_s = max(self._longest_s, time.monotonic() - sent_at)
        if reply.peak_bytes:
            self.peaks[worker] = reply.peak_bytes
        return reply

    async def prepare(self, options: str) -> list[tuple[str, ...]]:
        """Have every stage make its adapters. Return the names of what each trains. Raises as ``read``."""
        for i in range(len(self._stages)):
            self.send(i, lambda epoch, n: TrainingCommand(epoch, n, Task.PREPARE, options=options))
        names: list[tuple[str, ...]] = [()] * len(self._stages)
        for _ in self._stages:
            stage, reply = await self.read(PREPARE_TIMEOUT_S)
            names[stage] = reply.names
        return names

    async def read_state(self, stages: Sequence[int]) -> dict[str, Tensor]:
        """Return the training state of ``stages``, which must be idle. Raises as ``read``, and ``BadFrame``."""
        state: dict[str, Tensor] = {}
        size = 0
        for stage in stages:
            part = parts = 0
            while part == 0 or part < parts:
                self.send(stage, lambda epoch, n, p=part: TrainingCommand(epoch, n, Task.READ_STATE, part=p))  # type: ignore[misc]
                _, reply = await self.read()
                size += sum(memoryview(t.data).nbytes for t in reply.tensors)
                if size > MAX_STATE_BYTES:
                    raise BadFrame(f"the training state has more than {MAX_STATE_BYTES} bytes; lower the rank")
                state |= dict(zip(reply.names, reply.tensors, strict=True))
                part, parts = part + 1, reply.parts
        return state

    async def write_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Have a stage continue from ``state``. Raises as ``read``."""
        parts = split_state(state, lambda tensor: memoryview(tensor.data).nbytes)
        for i, part in enumerate(parts):
            names, tensors = tuple(part), tuple(part.values())
            last = i == len(parts) - 1
            self.send(
                stage,
                lambda epoch, n, names=names, tensors=tensors, last=last: TrainingCommand(  # type: ignore[misc]
                    epoch, n, Task.WRITE_STATE, update=last, names=names, tensors=tensors
                ),
            )
            await self.read()

    # On the streams' threads

    def _on_message(self, stage: int, message: bytes) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, (stage, message))

    def _on_lost(self, epoch: int, worker: str, why: str) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, WorkerLost(f"{worker}: {why}", worker=worker))
