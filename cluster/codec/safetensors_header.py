"""Writes the header of a safetensors file: ``u64 length | JSON``, padded so that tensors begin at a multiple of eight.

Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

__all__ = ["encode_header"]

ALIGNMENT: Final = 8
"""Tensor data starts at a multiple of this many bytes."""


def encode_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the header of a file with these tensors, in order: name, the format's type, shape, and bytes of each."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + nbytes)}
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
