"""Converts MLX arrays to a frame's raw tensors and back, and checks incoming tensors against the cut's boundary.

Outgoing data is a view of the array's memory. Incoming data is copied once, into MLX. bf16 stays bf16. It knows dtypes
and shapes, nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import mlx.core as mx

from cluster.core.errors import BadFrame
from cluster.core.frames import Tensor
from cluster.model.trace import Boundary, Leaf

__all__ = ["pack", "to_array", "unpack"]


def pack(array: mx.array) -> Tensor:
    """Return an evaluated, row-contiguous array as a tensor. Its ``data`` keeps the array alive; nothing is copied."""
    raw: Any = array  # mx.array supports the buffer protocol, but its type stubs do not declare it
    return Tensor(dtype_name(array.dtype), tuple(array.shape), memoryview(raw).cast("B"))


def unpack(tensors: Sequence[Tensor], boundary: Boundary | None, batch: int, length: int) -> list[mx.array]:
    """Return the incoming arrays for ``batch`` sequences of ``length`` tokens.

    ``boundary`` is None on the first stage, which has no incoming arrays. Raises BadFrame if number, dtype, shape or
    size do not match the boundary.
    """
    leaves = boundary.leaves if boundary else ()
    if len(tensors) != len(leaves):
        raise BadFrame(f"the frame has {len(tensors)} tensors; {len(leaves)} are expected at this cut")
    return [_array(tensor, leaf, batch, length) for tensor, leaf in zip(tensors, leaves, strict=True)]


def to_array(tensor: Tensor) -> mx.array:
    """Return a tensor of any shape as an array. Raises BadFrame if its size or type is invalid."""
    dtype: Any = getattr(mx, tensor.dtype, None)
    data = memoryview(tensor.data)
    if not isinstance(dtype, mx.Dtype) or data.nbytes != prod(tensor.shape) * dtype.size:
        raise BadFrame(f"a tensor {tensor.dtype[:32]} of shape {list(tensor.shape)} has {data.nbytes} bytes")
    raw: Any = data.cast("B")
    return mx.array(raw).view(dtype).reshape(tensor.shape)


def dtype_name(dtype: mx.Dtype) -> str:
    """Return MLX's name of ``dtype`` without its module: ``bfloat16``."""
    return str(dtype).rpartition(".")[2]


def _array(tensor: Tensor, leaf: Leaf, batch: int, length: int) -> mx.array:
    expected = dtype_name(leaf.dtype)
    if tensor.dtype != expected:
        raise BadFrame(f"a tensor has dtype {tensor.dtype!r}; {expected} is expected at this cut")
    known = {"batch": batch, "length": length}
    dims = [known.get(dim) if isinstance(dim, str) else dim for dim in leaf.dims]
    if len(dims) != len(tensor.shape) or any(d not in (None, size) for d, size in zip(dims, tensor.shape, strict=True)):
        raise BadFrame(f"a tensor has shape {list(tensor.shape)}; {dims} is expected at this cut (None: any size)")
    data = memoryview(tensor.data)
    if data.nbytes != prod(tensor.shape) * leaf.dtype.size:
        raise BadFrame(f"a tensor of shape {list(tensor.shape)} and dtype {expected} has {data.nbytes} bytes")
    raw: Any = data.cast("B")
    return mx.array(raw).view(leaf.dtype).reshape(tensor.shape)
