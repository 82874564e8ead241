# Generated from async_training.py by ops/clients. Edit that file, then run ops/clients.
"""The blocking client's training: sends options and data, and receives reports and adapters."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.client.calls import StreamCall
from cluster.client.following import FoundCall
from cluster.codec.plan import decode_progress
from cluster.codec.training import EventDecoder
from cluster.core.plan import LoadProgress
from cluster.core.training_events import TrainingEvent
from cluster.v1 import cluster_pb2

TrainCall = StreamCall[cluster_pb2.TrainResponse] | FoundCall[cluster_pb2.TrainResponse]


class Training:
    """A training in progress: iterate over it to get its events, until its last one.

    Leaving the loop early ends the training.
    """

    def __init__(self, call: TrainCall) -> None:
        self._call = call
        self._decoder = EventDecoder()

    def __iter__(self) -> Iterator[TrainingEvent | LoadProgress]:
        """Yield the progress of loads, reports, adapters and notices. Raises the MacpipeError that ended the run."""
        try:
            while (message := self._call.read()) is not None:
                if message.HasField("progress"):
                    yield decode_progress(message.progress)
                elif event := self._decoder.decode(message):
                    yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the training. Do nothing once it has ended."""
        self._call.cancel()
