"""Writes and reads adapters as the content of a safetensors file: ``u64 header length | JSON header | tensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, Final

from cluster.codec.safetensors_header import encode_header
from cluster.core.errors import InvalidOption
from cluster.core.frames import Tensor
from cluster.core.training_limits import MAX_TRAINING_HEADER_BYTES

__all__ = ["read_adapters", "write_adapters"]

_NAMES: Final = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
_TYPES: Final = MappingProxyType({name: dtype for dtype, name in _NAMES.items()})
_ITEM_BYTES: Final = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2})


def write_adapters(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file with these tensors by name."""
    bodies = [memoryview(tensor.data).cast("B") for tensor in tensors.values()]
    entries = (
        (name, _NAMES[t.dtype], t.shape, body.nbytes) for (name, t), body in zip(tensors.items(), bodies, strict=True)
    )
    return b"".join((encode_header(entries), *bodies))


def read_adapters(content: bytes) -> dict[str, Tensor]:
    """Return the tensors in a file's content by name. Raises ``InvalidOption`` if it is damaged."""
    length = int.from_bytes(content[:8], "little")
    try:
        if length > min(MAX_TRAINING_HEADER_BYTES, len(content) - 8):
            raise ValueError("its header is too long")
        header = json.loads(content[8 : 8 + length])
        return {name: _read(entry, memoryview(content)[8 + length :]) for name, entry in _entries(header)}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidOption(
            f"the adapter file is damaged, or is no safetensors file: {error}", field="resume_adapter_file"
        ) from error


def _entries(header: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(header, dict):
        raise TypeError("its header is not an object")
    return [(name, entry) for name, entry in header.items() if name != "__metadata__"]


def _read(entry: dict[str, Any], data: memoryview) -> Tensor:
    dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or end > len(data):
        raise ValueError("a tensor is outside the file")
    if end - start != prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"a tensor has {end - start} bytes, but its shape needs {prod(shape) * _ITEM_BYTES[dtype]}")
    return Tensor(dtype, shape, data[start:end])
