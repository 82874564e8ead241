"""Reads what a checkpoint's headers tell people of a model: its architecture, its size and the bits of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from cluster.model.checkpoint import open_checkpoint
from cluster.model.safetensors import TensorInfo

__all__ = ["ModelDetails", "read_details"]

GROUP_SIZE: Final = 64
"""mlx-lm's default."""
SCALES: Final = ".scales"
WEIGHT: Final = ".weight"


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """What people are told of a model.

    ``architecture`` is the config's ``model_type``. ``parameters`` counts weights as they were before quantization.
    ``quantization`` is such as ``4-bit``, ``mxfp4`` or, for numbers that are not quantized, ``BF16``. ``width`` is the
    size of a hidden state; 0 if the config does not tell it.
    """

    architecture: str
    parameters: int
    quantization: str
    width: int


def read_details(folder: Path) -> ModelDetails:
    """Return the details of the checkpoint in ``folder``. Raises the errors of ``open_checkpoint``."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    nested = config.get("text_config")
    width = config.get("hidden_size") or (nested.get("hidden_size") if isinstance(nested, Mapping) else 0)
    return ModelDetails(
        architecture=str(config.get("model_type") or "unknown")[:64],
        parameters=_count(checkpoint.tensors, _mapping(config.get("quantization"))),
        quantization=_quantization(checkpoint.tensors, _mapping(config.get("quantization"))),
        width=width if isinstance(width, int) else 0,
    )


def _count(tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> int:
    """Return the number of weights. A quantized one has as many as its scales, times the group of each scale."""
    count = 0
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        quantized = tensors.get(f"{module}{SCALES}")
        if quantized is None:
            count += prod(tensor.shape)
        elif f".{kind}" == WEIGHT:
            count += prod(quantized.shape) * _group_size(quantization, module)
        elif kind not in ("scales", "biases"):
            count += prod(tensor.shape)
    return count


def _group_size(quantization: Mapping[str, Any], module: str) -> int:
    own = _mapping(quantization.get(module)).get("group_size")
    size = own or quantization.get("group_size") or GROUP_SIZE
    return size if isinstance(size, int) else GROUP_SIZE


def _quantization(tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> str:
    """Return the mode and bits of most weights, or the type of the largest tensor if they are not quantized."""
    mode, bits = quantization.get("mode", "affine"), quantization.get("bits")
    if isinstance(bits, int):
        return f"{bits}-bit" if mode == "affine" else str(mode)[:16]
    return max(tensors.values(), key=lambda tensor: tensor.nbytes).dtype if tensors else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
