"""Lays converted tensors out in safetensors files, and writes these files from the first byte to the last.

The names of the files and the size of a shard are those of mlx-lm. This module knows bytes and offsets, not models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.codec.safetensors_header import encode_header
from cluster.core.limits import GIB
from cluster.model.checkpoint import INDEX
from cluster.model.converted_weights import ConvertedTensor
from cluster.platform.private_files import write_all

__all__ = ["SHARD_BYTES", "ShardLayout", "ShardWriter", "lay_out"]

SHARD_BYTES: Final = 5 * GIB
"""Most bytes of tensors in one file, as mlx-lm writes them. A larger tensor has a file to itself."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file: its name, its tensors in order, and its header with the length field."""

    file: str
    tensors: tuple[ConvertedTensor, ...]
    header: bytes


def lay_out(tensors: Sequence[ConvertedTensor], shard_bytes: int = SHARD_BYTES) -> tuple[ShardLayout, ...]:
    """Group tensors, in order, into files of at most ``shard_bytes``. Return one layout per file."""
    groups: list[list[ConvertedTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    headers = (encode_header((t.name, t.dtype, t.shape, t.nbytes) for t in group) for group in groups)
    return tuple(map(ShardLayout, names, map(tuple, groups), headers))


SINGLE: Final = "model.safetensors"


def write_index(folder: Path, layouts: Sequence[ShardLayout], total_parameters: int) -> None:
    """Write the index that names each tensor's file. Raises OSError."""
    files = {tensor.name: layout.file for layout in layouts for tensor in layout.tensors}
    total = sum(tensor.nbytes for layout in layouts for tensor in layout.tensors)
    index = {
        "metadata": {"total_size": total, "total_parameters": total_parameters},
        "weight_map": dict(sorted(files.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")


class ShardWriter:
    """Writes tensors in the order of ``layouts`` into ``folder``, after the ``done`` tensors that it has already.

    What is in the files beyond those tensors is cut off: it was not recorded as written. Methods raise OSError.
    """

    def __init__(self, folder: Path, layouts: Sequence[ShardLayout], done: int) -> None:
        self._folder = folder
        self._places = [(layout, tensor) for layout in layouts for tensor in layout.tensors]
        self._next = done
        self._layout: ShardLayout | None = None
        self._file = -1

    def write(self, data: memoryview) -> None:
        """Append the next tensor."""
        layout, tensor = self._places[self._next]
        if len(data) != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {len(data)} bytes, not {tensor.nbytes}")
        if layout is not self._layout:
            self._open(layout, tensor)
        write_all(self._file, data)
        self._next += 1

    def sync(self) -> int:
        """Put on disk what was written. Return how many tensors are there."""
        if self._file >= 0:
            os.fsync(self._file)
        return self._next

    def close(self) -> None:
        """Close the current file without syncing it. Can be called more than once."""
        if self._file >= 0:
            os.close(self._file)
        self._layout, self._file = None, -1

    def _open(self, layout: ShardLayout, tensor: ConvertedTensor) -> None:
        """Open the file of ``layout`` so that the next byte is the first of ``tensor``."""
        self.sync()
        self.close()
        before = layout.tensors[: layout.tensors.index(tensor)]
        start = len(layout.header) + sum(one.nbytes for one in before) if before else 0
        path = self._folder / layout.file
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._layout = layout
        os.ftruncate(self._file, start)
        os.lseek(self._file, start, os.SEEK_SET)
        if not before:
            write_all(self._file, layout.header)
