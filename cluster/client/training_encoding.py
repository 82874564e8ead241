"""Encodes a training's options and files, piece by piece, for both clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.core.training_limits import DATA_CHUNK_BYTES
from cluster.v1 import cluster_pb2

if TYPE_CHECKING:
    from cluster.core.training import TrainingOptions


def encode_training(
    model: str, options: TrainingOptions, files: Mapping[str, Path], workers: int | None, layers: str | None
) -> Iterator[cluster_pb2.TrainRequest]:
    """Yield the messages of a call. ``files`` are data sets and adapters by name; they are read as they are sent."""
    start = cluster_pb2.TrainStart(model=model, workers=workers or 0, layers=layers or "", options=options.to_json())
    yield cluster_pb2.TrainRequest(start=start)
    for name, file in files.items():
        with file.open("rb") as content:
            while piece := content.read(DATA_CHUNK_BYTES):
                yield cluster_pb2.TrainRequest(file=cluster_pb2.TrainFile(name=name, data=piece))
