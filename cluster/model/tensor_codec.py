"""MLX arrays to the frame's raw tensors and back, checked against what a cut should carry.

Outgoing data is a view of the array's own memory; incoming data is copied once, into MLX. bf16 stays bf16.
It knows dtypes and shapes, nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import mlx.core as mx

from cluster.core.errors import BadFrame
from cluster.core.frames import Tensor
from cluster.model.trace import Boundary, Leaf

__all__ = ["pack", "unpack"]


def pack(array: mx.array) -> Tensor:
    """Describe an evaluated, row-contiguous array. The tensor's ``data`` keeps the array alive; nothing is copied."""
    raw: Any = array  # it offers Python's buffer protocol, which its type does not say
    return Tensor(dtype_name(array.dtype), tuple(array.shape), memoryview(raw).cast("B"))


def unpack(tensors: Sequence[Tensor], boundary: Boundary | None, batch: int, length: int) -> list[mx.array]:
    """The arrays of an incoming boundary value for ``batch`` sequences of ``length`` tokens.

    ``boundary`` None is the model's beginning, where nothing comes in. Raises BadFrame when number, dtype, shape or
    size is not what the cut carries.
    """
    leaves = boundary.leaves if boundary else ()
    if len(tensors) != len(leaves):
        raise BadFrame(f"a frame carries {len(tensors)} tensors where {len(leaves)} cross the cut")
    return [_array(tensor, leaf, batch, length) for tensor, leaf in zip(tensors, leaves, strict=True)]


def dtype_name(dtype: mx.Dtype) -> str:
    """MLX's name without its module: ``bfloat16``."""
    return str(dtype).rpartition(".")[2]


def _array(tensor: Tensor, leaf: Leaf, batch: int, length: int) -> mx.array:
    expected = dtype_name(leaf.dtype)
    if tensor.dtype != expected:
        raise BadFrame(f"a tensor is {tensor.dtype!r} where {expected} crosses the cut")
    known = {"batch": batch, "length": length}
    dims = [known.get(dim) if isinstance(dim, str) else dim for dim in leaf.dims]
    if len(dims) != len(tensor.shape) or any(d not in (None, size) for d, size in zip(dims, tensor.shape, strict=True)):
        raise BadFrame(f"a tensor has shape {list(tensor.shape)} where {dims} crosses the cut (null: any size)")
    data = memoryview(tensor.data)
    if data.nbytes != prod(tensor.shape) * leaf.dtype.size:
        raise BadFrame(f"a tensor of shape {list(tensor.shape)} and dtype {expected} has {data.nbytes} bytes")
    raw: Any = data.cast("B")
    return mx.array(raw).view(leaf.dtype).reshape(tensor.shape)
