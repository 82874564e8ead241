"""Builds mlx-lm's own model from a checkpoint, without reading weights.

mlx-lm sanitizes the names, applies the quantization with its per-layer overrides, and implements the architecture.
This module knows how to open a model and which errors can occur; it knows nothing of cuts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.utils import load_model

from cluster.core.errors import BadCheckpoint, InvalidOption, MacpipeError, ModelUnsupported
from cluster.core.quantization import choose_weight_quantization
from cluster.model.device import settle_random_state
from cluster.model.library_errors import describe_error
from cluster.model.module_tree import Module
from cluster.model.weight_conversion import Conversion, convert_model

__all__ = ["open_model", "open_skeleton"]


def open_skeleton(path: Path, weight_bits: int = 0) -> Module:
    """Return the whole model with lazy arrays: nothing is read until an array is evaluated.

    ``weight_bits`` quantizes the weights as they are read, as a conversion with mlx-lm's defaults would; 0 leaves them
    as they are. Raises ModelUnsupported (mlx-lm does not know the architecture, or cannot quantize it), BadCheckpoint
    (weights or config do not fit it) and InvalidOption (``weight_bits``, or the model is quantized already).
    """
    model, config = open_model(path)
    if weight_bits:
        model = _quantize(model, config, weight_bits)
    if not hasattr(model, "layers"):
        raise ModelUnsupported(
            f"{type(model).__module__.rpartition('.')[2]} models have no list of layers to split; choose another model"
        )
    return model


def open_model(path: Path) -> tuple[Module, dict[str, Any]]:
    """Return the whole model with lazy arrays, and its config as mlx-lm understands it. Raises as ``open_skeleton``."""
    try:
        opened: tuple[Module, dict[str, Any]] = load_model(path, lazy=True, trust_remote_code=False)
    except SystemExit as ended:  # mlx-lm's olmo exits if a package is missing, after printing its name
        raise ModelUnsupported(
            f"mlx-lm's code for the model in {str(path)!r} needs a package that is not installed; install it"
        ) from ended
    except Exception as error:  # model code may raise anything for an invalid config
        raise _open_error(path, error) from error
    settle_random_state()
    return opened


def _quantize(model: Module, config: dict[str, Any], weight_bits: int) -> Module:
    conversion = Conversion(choose_weight_quantization("affine", weight_bits))
    if config.get("quantization"):  # a quantization_config alone may be of numbers that mlx-lm dequantizes
        raise InvalidOption(
            "the model is quantized already; load it without quantization, or load its unquantized version",
            field="quantize",
        )
    return convert_model(model, config, conversion)[0]


def _open_error(path: Path, error: Exception) -> MacpipeError:
    what = describe_error(error)
    if isinstance(error, ValueError) and what.startswith("Model type "):
        return ModelUnsupported(f"mlx-lm does not know this architecture: {what}")
    if isinstance(error, KeyError) and error.args == ("model_type",):
        return BadCheckpoint("config.json has no model_type; copy or fetch the model again", file="config.json")
    return BadCheckpoint(f"mlx-lm cannot build the model in {str(path)!r}: {type(error).__name__}: {what}")
