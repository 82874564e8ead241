"""Gives a GGUF file the form of a checkpoint whose tensors are there when they are needed, and not before or after.

The headers, the config and the tokenizer are written at once (``gguf_header``). ``prepare`` dequantizes the tensors of
one layer into their file, and empties the file of the layer before, so the disk never has the whole model so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from cluster.conversion.converter import Converted, Report, convert_into
from cluster.conversion.gguf_tensors import GgufTensor, StoredTensor, group_of
from cluster.conversion.work_folder import open_work_folder, report_write_errors
from cluster.core.errors import BadCheckpoint, MacpipeError, Reason
from cluster.core.limits import MIB
from cluster.model.checkpoint import open_checkpoint
from cluster.model.float_cast import cast_floats
from cluster.model.safetensors import TensorInfo
from cluster.model.weight_conversion import Conversion
from cluster.platform.private_files import write_all
from cluster.platform.process import isolated_environment

__all__ = ["GgufSource", "convert_gguf"]

ReadHeader = Callable[[Path, Path, str], Sequence[GgufTensor]]
"""Takes the GGUF file, the folder to write to and the type of the weights, as ``gguf_header.write_checkpoint``."""

HEADER_TIMEOUT_S: Final = 600.0
"""Reading the largest vocabularies takes ten seconds."""
CHUNK_BYTES: Final = 8 * MIB
"""Bytes of float32 numbers that are dequantized at once. Every library call on the way holds a few times as many."""


class GgufSource:
    """The checkpoint that stands for a GGUF file. ``fingerprint`` identifies its content, ``dtype`` its numbers."""

    def __init__(self, file: Path, folder: Path, tensors: Sequence[GgufTensor]) -> None:
        checkpoint = open_checkpoint(folder)
        stat = file.stat()
        version = f"{checkpoint.fingerprint} {stat.st_size} {stat.st_mtime_ns}"
        self.folder = folder
        self.fingerprint = hashlib.sha256(version.encode()).hexdigest()
        self._dtype = str(checkpoint.config["torch_dtype"])
        self._file = file
        self._places = checkpoint.tensors
        self._groups: dict[str, list[GgufTensor]] = {}
        for tensor in tensors:
            self._groups.setdefault(group_of(tensor.name), []).append(tensor)
        self._present = ""

    def prepare(self, name: str) -> None:
        """Put the layer of the tensor ``name`` into its file, unless it is there. Raises BadCheckpoint and DiskFull."""
        group = group_of(name)
        if group == self._present or group not in self._groups:
            return
        self._empty(self._present)
        self._present = group
        try:
            with self._file.open("rb") as source:
                for tensor in self._groups[group]:
                    self._fill(source.fileno(), tensor)
        except EOFError as error:
            raise BadCheckpoint(f"{self._file.name} was truncated while it was read; get the file again") from error

    def _empty(self, group: str) -> None:
        members = self._groups.get(group)
        if members:
            places = [self._places[member.name] for member in members]
            path = self.folder / places[0].file
            with report_write_errors(path):
                os.truncate(path, min(place.offset for place in places))

    def _fill(self, source: int, tensor: GgufTensor) -> None:
        place = self._places[tensor.name]
        path = self.folder / place.file
        with report_write_errors(path):
            target = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with report_write_errors(path):
                os.lseek(target, place.offset, os.SEEK_SET)
            for numbers in _read_numbers(source, tensor):
                data = cast_floats(numbers, self._dtype)
                with report_write_errors(path):
                    write_all(target, data)
        finally:
            os.close(target)
        _require_filled(path, place)


def convert_gguf(
    file: Path,
    target: Path,
    conversion: Conversion,
    report: Report,
    read_header: ReadHeader | None = None,
) -> Converted:
    """Convert a GGUF file into the new folder ``target``. Its numbers are dequantized, cast, then quantized.

    ``read_header`` writes the checkpoint that stands for the file; by default, a process of its own does.
    Raises InvalidOption (``target`` exists), DiskFull, ModelUnsupported (the architecture, a tensor's type or the
    tokenizer is not supported) and BadCheckpoint.
    """
    with open_work_folder(target) as work:
        with report_write_errors(work.path):
            work.remove_source()
            work.source.mkdir()
        tensors = (read_header or read_in_process)(file, work.source, conversion.dtype)
        source = GgufSource(file, work.source, tensors)
        return convert_into(work, source.folder, source.fingerprint, conversion, report, source.prepare)


def read_in_process(file: Path, folder: Path, dtype: str) -> Sequence[GgufTensor]:
    """Have another process write the checkpoint that stands for ``file``. ``dtype`` "" means the file's own type.

    Raises ModelUnsupported, which names what is not supported, and BadCheckpoint.
    """
    command = [sys.executable, "-m", "cluster.conversion.gguf_header", str(file), str(folder), dtype]
    try:
        ended = subprocess.run(
            command,
            env=isolated_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HEADER_TIMEOUT_S,
            check=False,
        )
        answer = json.loads(ended.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        raise BadCheckpoint(f"the header of {file.name} could not be read; get the file again") from error
    if "reason" in answer:
        raise MacpipeError.of(Reason.parse(answer["reason"]), answer["sentence"])
    return tuple(_tensor(one) for one in answer["tensors"])


def _tensor(told: dict[str, Any]) -> GgufTensor:
    stored = told["stored"]
    return GgufTensor(
        **{**told, "stored": StoredTensor(**{**stored, "shape": tuple(stored["shape"])})},
    )


def _read_numbers(source: int, tensor: GgufTensor) -> Iterator[Any]:
    """Yield the tensor as float32 chunks, its rows in the model's order."""
    stored = tensor.stored
    kind = GGMLQuantizationType(stored.type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = stored.shape[0] if tensor.heads or len(stored.shape) > 1 else 1
    columns = int(np.prod(stored.shape)) // max(rows, 1)
    row_bytes = columns // block * block_bytes
    order = _row_order(rows, tensor.heads)
    step = max(1, CHUNK_BYTES // max(1, 4 * columns))
    for first in range(0, rows, step):
        raw = _read_rows(source, stored.offset, row_bytes, order[first : first + step])
        numbers = np.asarray(dequantize(raw, kind), dtype=np.float32)
        yield numbers + np.float32(tensor.shift) if tensor.shift else numbers


def _row_order(rows: int, heads: int) -> Any:
    """Return the number in the file of each of the model's rows. A head's even rows come first in the model."""
    order = np.arange(rows)
    return order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1) if heads else order


def _read_rows(source: int, offset: int, row_bytes: int, rows: Any) -> Any:
    """Return the bytes of ``rows``, an array of numbers of rows. All from the first to the last are read at once."""
    first, last = int(rows.min()), int(rows.max())
    wanted = (last + 1 - first) * row_bytes
    data = _read_exactly(source, wanted, offset + first * row_bytes)
    return np.frombuffer(data, np.uint8).reshape(-1, row_bytes)[rows - first]


def _read_exactly(source: int, count: int, offset: int) -> bytes:
    pieces = []
    while count:
        piece = os.pread(source, count, offset)
        if not piece:
            raise EOFError
        pieces.append(piece)
        count -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _require_filled(path: Path, place: TensorInfo) -> None:
    if path.stat().st_size < place.end:
        raise BadCheckpoint(f"{place.name} has fewer numbers in the GGUF file than its shape says; get the file again")
