"""The Train call: receive a run's options and data, then run it and send its events."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

import anyio

from cluster.codec.adapter_file import read_adapters
from cluster.codec.plan import encode_progress
from cluster.codec.training import encode_event
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.training_run import TrainingRequest
from cluster.core.errors import InvalidRequest, SlowReader, TooLarge
from cluster.core.limits import BODY_TIMEOUT_S
from cluster.core.plan import LoadProgress, Plan
from cluster.core.text import parse_layers
from cluster.core.training import DATA_SETS, TrainingOptions
from cluster.core.training_events import TrainingEvent
from cluster.core.training_limits import MAX_DATA_BYTES, MAX_EVENTS_WAITING
from cluster.core.worker import WorkerInfo
from cluster.v1 import cluster_pb2 as pb

__all__ = ["train"]

_FILES = (*DATA_SETS, "adapters")


async def train(
    coordinator: Coordinator, messages: AsyncIterator[pb.TrainRequest]
) -> AsyncGenerator[pb.TrainResponse, None]:
    """Run a training and yield its events. Closing the iterator ends it. Raises what ``Coordinator.train`` raises."""
    with tempfile.TemporaryDirectory(prefix="macpipe-training-") as name:
        request = await _receive(messages, Path(name))
        events = _EventQueue()
        task = asyncio.create_task(coordinator.train(request, events.tell, events))
        task.add_done_callback(lambda _: events.end())
        try:
            while (event := await events.queue.get()) is not None:
                if isinstance(event, LoadProgress):
                    yield pb.TrainResponse(progress=encode_progress(event))
                    continue
                for message in encode_event(event):
                    yield message
            await task
        finally:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((task,))


async def _receive(messages: AsyncIterator[pb.TrainRequest], folder: Path) -> TrainingRequest:
    """Store the files that a client sends in ``folder`` and return its request.

    Raises ``InvalidRequest``, ``InvalidOption``, and ``TooLarge`` for more than ``MAX_DATA_BYTES``.
    """
    first = await _next(messages)
    if first is None or first.WhichOneof("part") != "start":
        raise InvalidRequest("a training begins with its options")
    options = TrainingOptions.from_json(first.start.options)
    if not first.start.model:
        raise InvalidRequest("the model is missing; name a Hugging Face id or a folder", field="model")
    size = 0
    while (message := await _next(messages)) is not None:
        size += len(message.file.data)
        if size > MAX_DATA_BYTES:
            raise TooLarge(f"the training data has more than {MAX_DATA_BYTES} bytes; use less data", field="data")
        if message.file.name not in _FILES:
            raise InvalidRequest(f"a file must be one of {', '.join(_FILES)}", field="file")
        await anyio.to_thread.run_sync(_append, folder / f"{message.file.name}.jsonl", message.file.data)
    adapters = folder / "adapters.jsonl"
    given = await anyio.to_thread.run_sync(adapters.read_bytes) if adapters.is_file() else b""
    order = LoadOrder(
        model=first.start.model,
        worker_count=first.start.workers or None,
        layers=parse_layers(first.start.layers) if first.start.layers else None,
    )
    return TrainingRequest(order, options, folder, read_adapters(given) if given else {})


async def _next(messages: AsyncIterator[pb.TrainRequest]) -> pb.TrainRequest | None:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await anext(messages, None)
    except TimeoutError:
        raise InvalidRequest(f"no training data arrived for {BODY_TIMEOUT_S:.0f} s") from None


def _append(file: Path, data: bytes) -> None:
    with file.open("ab") as to:
        to.write(data)


class _EventQueue:
    """Queues events and the progress of loads for the client. A client that does not read them ends its run."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[TrainingEvent | LoadProgress | None] = asyncio.Queue()  # bounded by ``tell``

    def tell(self, event: TrainingEvent) -> None:
        if self.queue.qsize() >= MAX_EVENTS_WAITING:
            raise SlowReader(f"the client has not read {MAX_EVENTS_WAITING} events of its training")
        self.queue.put_nowait(event)

    def end(self) -> None:
        self.queue.put_nowait(None)

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None: ...

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None:
        if self.queue.qsize() < MAX_EVENTS_WAITING:
            self.queue.put_nowait(progress)
