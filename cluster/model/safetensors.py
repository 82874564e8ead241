"""Reads and validates the header of a safetensors file. Reads no tensor and does not import MLX.

It does not trust the file: every length and offset is checked against the file's real size before it is used.
Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from cluster.core import limits
from cluster.core.errors import BadCheckpoint

__all__ = ["Shard", "TensorInfo", "read_shard"]

BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by the format's name of its type."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a header. ``dtype`` is the format's name (``BF16``); ``file`` is a name without a folder.

    The tensor's bytes are ``offset .. offset + nbytes - 1`` of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int
    offset: int

    @property
    def end(self) -> int:
        """Return the file offset after the tensor's last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: the raw bytes of its header, and the tensors in that header."""

    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]


def read_shard(path: Path) -> Shard:
    """Read and check the header of one file. Raises BadCheckpoint, which names the file."""
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise BadCheckpoint(f"{path.name} is not a regular file; copy or fetch it again", file=path.name)
    size = path.stat().st_size
    header = _header_bytes(path, size)
    entries = _header_json(path, header)
    entries.pop("__metadata__", None)
    data = 8 + len(header)
    tensors = tuple(_describe(path, data, name, entry) for name, entry in entries.items())
    missing = max((tensor.end for tensor in tensors), default=data) - size
    if missing > 0:
        raise BadCheckpoint(
            f"{path.name} is cut short: {missing} bytes are missing; copy or fetch the file again",
            file=path.name,
            missing_bytes=str(missing),
        )
    return Shard(path.name, header, tensors)


def _header_bytes(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise BadCheckpoint(f"{path.name} is cut short: {8 - size} bytes of its header's length are missing")
        if length > limits.MAX_SAFETENSORS_HEADER_BYTES:
            raise _damaged_header(path, f"its stated length of {length} bytes is above the limit")
        header = file.read(length)
    if len(header) < length:
        raise BadCheckpoint(
            f"{path.name} is cut short: {length - len(header)} bytes of its header are missing; "
            "copy or fetch the file again",
            file=path.name,
            missing_bytes=str(length - len(header)),
        )
    return header


def _header_json(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged_header(path, "it is not JSON") from error
    if not isinstance(entries, dict):
        raise _damaged_header(path, "it is not a JSON object")
    return entries


def _describe(path: Path, data: int, name: str, entry: Any) -> TensorInfo:
    """Check one header entry. ``data`` is the offset of the file's first tensor byte."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        bits = BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_header(path, f"the entry of {name[:200]!r} does not describe a tensor") from error
    numbers = (*shape, start, end)
    if not all(type(n) is int and n >= 0 for n in numbers) or (end - start) * 8 != prod(shape) * bits:
        raise _damaged_header(path, f"the offsets of {name[:200]!r} do not match its shape")
    return TensorInfo(name, dtype, shape, path.name, end - start, data + start)


def _damaged_header(path: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(f"the header of {path.name} is damaged: {why}; copy or fetch the file again", file=path.name)
