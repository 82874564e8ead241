"""The asyncio client's training: sends options and data, and receives reports and adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cluster.client.async_calls import AsyncStreamCall
from cluster.client.async_following import AsyncFoundCall
from cluster.codec.plan import decode_progress
from cluster.codec.training import EventDecoder
from cluster.core.plan import LoadProgress
from cluster.core.training_events import TrainingEvent
from cluster.v1 import cluster_pb2

TrainCall = AsyncStreamCall[cluster_pb2.TrainResponse] | AsyncFoundCall[cluster_pb2.TrainResponse]


class AsyncTraining:
    """A training in progress: iterate over it with ``async for`` to get its events, until its last one.

    Leaving the loop early ends the training.
    """

    def __init__(self, call: TrainCall) -> None:
        self._call = call
        self._decoder = EventDecoder()

    async def __aiter__(self) -> AsyncIterator[TrainingEvent | LoadProgress]:
        """Yield the progress of loads, reports, adapters and notices. Raises the MacpipeError that ended the run."""
        try:
            while (message := await self._call.read()) is not None:
                if message.HasField("progress"):
                    yield decode_progress(message.progress)
                elif event := self._decoder.decode(message):
                    yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the training. Do nothing once it has ended."""
        self._call.cancel()
