"""Describes a model's weights after a conversion, and computes them one at a time.

mlx-lm's own code builds a graph of lazy arrays, so nothing is read or computed until a tensor is taken. This module
knows nothing of files that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import compute_bits_per_weight, get_total_parameters, save_config

from cluster.core.errors import BadCheckpoint
from cluster.model.adapters import fuse_adapter
from cluster.model.module_tree import Module, parameters
from cluster.model.skeleton import open_model
from cluster.model.weight_conversion import Conversion, convert_model

__all__ = ["ConvertedTensor", "ConvertedWeights"]

DTYPES: Final[Mapping[mx.Dtype, str]] = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.uint32: "U32",
    mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
    mx.complex64: "C64",
}  # fmt: skip
"""The safetensors format's name of each of MLX's types."""


@dataclass(frozen=True, slots=True)
class ConvertedTensor:
    """A tensor of the result. ``dtype`` is the safetensors format's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class ConvertedWeights:
    """The weights of the checkpoint in ``path`` after ``conversion``, in the order in which mlx-lm saves them.

    ``config`` is the converted model's. Raises ModelUnsupported (mlx-lm does not know the architecture, or cannot
    convert it so), BadCheckpoint, and the errors of ``fuse_adapter``.
    """

    def __init__(self, path: Path, conversion: Conversion) -> None:
        model, config = open_model(path)
        if conversion.adapter:
            fuse_adapter(model, conversion.adapter, dequantize=conversion.dequantize)
        model, self.config = convert_model(model, config, conversion)
        self.bits_per_weight = float(compute_bits_per_weight(model))  # type: ignore[no-untyped-call]
        self.parameters = int(get_total_parameters(model))  # type: ignore[no-untyped-call]
        self._keeps_vision = "vision_tower" in getattr(model, "model", {})
        self._arrays = parameters(model)
        _drop_parameters(model)
        self.tensors = tuple(_describe(name, array) for name, array in self._arrays.items())

    def take(self, name: str) -> memoryview:
        """Compute a tensor and return its bytes, row by row. Each tensor can be taken once.

        Raises BadCheckpoint if the files cannot be read.
        """
        try:
            array = mx.contiguous(self._arrays.pop(name))
            mx.eval(array)
        except RuntimeError as error:  # MLX raises this for files that vanish or shrink during the read
            raise BadCheckpoint(f"the model's files could not be read: {error}") from error
        mx.clear_cache()
        raw: Any = array.reshape(-1)  # the buffer protocol needs a dimension
        return memoryview(raw).cast("B")

    def drop(self, name: str) -> None:
        """Forget a tensor that is not needed, without computing it."""
        del self._arrays[name]

    def save_config(self, file: Path) -> None:
        """Write the converted model's config.json. Raises OSError."""
        save_config(self.config, file, keep_vision_config=self._keeps_vision)


def _drop_parameters(model: Module) -> None:
    """Remove the arrays from the model, which would else keep every tensor that was computed."""
    model.update(tree_map(lambda _: mx.zeros(()), model.parameters()))  # type: ignore[no-untyped-call]


def _describe(name: str, array: mx.array) -> ConvertedTensor:
    return ConvertedTensor(name, DTYPES[array.dtype], tuple(array.shape), array.nbytes)
