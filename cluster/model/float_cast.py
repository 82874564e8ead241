"""Casts float32 numbers to another type, as MLX rounds them. bfloat16 has no counterpart in NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

__all__ = ["cast_floats"]


def cast_floats(numbers: Any, dtype: str) -> memoryview:
    """Return the bytes of an array of float32 ``numbers`` (a NumPy array) as ``dtype``, MLX's name of a type."""
    raw: Any = mx.array(numbers).astype(getattr(mx, dtype)).reshape(-1)
    mx.eval(raw)
    return memoryview(raw).cast("B")
