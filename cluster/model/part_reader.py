"""Reads parts of file tensors: only the bytes that a rank keeps.

A range of rows is one piece of a file. A range of columns is a piece of each row. Where the bytes between two pieces
are fewer than a system call is worth, they are read too. Others are read by several threads, since a disk answers many
small reads together in the time of one. It knows bytes and positions, nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Final, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import BadCheckpoint
from cluster.model.safetensors import TensorInfo
from cluster.model.shard_map import Run, TensorPart
from cluster.model.tensor_map import DTYPES

__all__ = ["PartReader"]

Bytes = NDArray[np.uint8]
_SMALL_GAP: Final = 128
"""Bytes between two pieces of a row up to which rows are read whole."""
_THREADS: Final = 16
"""Small reads that a disk is asked for at once."""
_BLOCK: Final = 8 * 2**20
"""Bytes of the longest single read."""


class PartReader:
    """Reads parts of the tensors of the checkpoint in ``folder``. A context manager, which ends its threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(_THREADS, "part-reader")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read(self, part: TensorPart) -> mx.array:
        """Return an evaluated array with the part's elements. Raises BadCheckpoint if the files cannot be read."""
        tensors, axes = part.source.tensors, part.axes
        if part.source.stacked:
            tensors = tuple(tensors[i] for start, end in axes[0] for i in range(start, end))
            axes = axes[1:]
        dtype = DTYPES[tensors[0].dtype]
        content = np.empty((len(tensors), prod(part.shape) * dtype.size // len(tensors)), np.uint8)
        for tensor, out in zip(tensors, content, strict=True):
            self._read_tensor(tensor, axes, out)
        array = mx.array(content.reshape(-1)).view(dtype).reshape(part.shape)
        mx.eval(array)
        return array

    def _read_tensor(self, tensor: TensorInfo, axes: Sequence[tuple[Run, ...]], out: Bytes) -> None:
        """Read the positions ``axes`` of one tensor into ``out``.

        The last axis that is cut divides the tensor: the axes before it say which rows are read, it says which pieces
        of a row.
        """
        cut = max((i for i, runs in enumerate(axes) if runs != ((0, tensor.shape[i]),)), default=0)
        inner = tensor.nbytes // prod(tensor.shape[: cut + 1])
        pieces = [(start * inner, end * inner) for start, end in axes[cut]]
        row = tensor.shape[cut] * inner
        rows = _rows(tensor.shape[:cut], axes[:cut])
        kept = out.reshape(len(rows), -1)
        with _opened(self._folder / tensor.file) as file:
            if len(rows) > 1 and (row - kept.shape[1]) <= _SMALL_GAP * len(pieces):
                _read_whole_rows(file, tensor.offset, row, rows, pieces, kept)
                return

            def read(lines: slice) -> None:
                _read_pieces(file, tensor.offset + rows[lines] * row, pieces, kept[lines])

            count = -(-len(rows) // _THREADS)
            list(self._threads.map(read, [slice(i, i + count) for i in range(0, len(rows), count)]))


def _read_pieces(file: int, rows: NDArray[np.int64], pieces: Sequence[Run], out: Bytes) -> None:
    """Read the pieces of the rows that begin at these offsets of the file."""
    for offset, line in zip(rows.tolist(), out, strict=True):
        at = 0
        for start, end in pieces:
            _read_into(file, offset + start, line[at : at + end - start])
            at += end - start


def _rows(shape: Sequence[int], axes: Sequence[tuple[Run, ...]]) -> NDArray[np.int64]:
    """Return the numbers of the rows at these positions of the axes before the row, in order."""
    numbers = np.zeros(1, np.int64)
    for length, runs in zip(shape, axes, strict=True):
        positions = np.concatenate([np.arange(start, end) for start, end in runs])
        numbers = (numbers[:, None] * length + positions).reshape(-1)
    return numbers


def _read_whole_rows(
    file: int, offset: int, row: int, rows: NDArray[np.int64], pieces: Sequence[Run], out: Bytes
) -> None:
    """Read runs of neighbouring rows in blocks, and keep their pieces."""
    most = max(1, _BLOCK // row)
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        for first in range(start, end, most):
            count = min(most, end - first)
            block = np.empty((count, row), np.uint8)
            _read_into(file, offset + int(rows[first]) * row, block.reshape(-1))
            out[first : first + count] = np.concatenate([block[:, a:b] for a, b in pieces], axis=1)


def _read_into(file: int, offset: int, out: Bytes) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(file, [out[done : done + _BLOCK].data], offset + done)
        if not count:
            raise BadCheckpoint("the model's files could not be read: one of them became shorter during the load")
        done += count


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file: int | None = None
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        yield file
    except OSError as error:
        raise BadCheckpoint(f"the model's files could not be read: {error}") from error
    finally:
        if file is not None:
            os.close(file)
