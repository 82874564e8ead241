"""Describes a model's weights after a conversion, and computes them one at a time.

mlx-lm's own code sanitizes, casts, quantizes and dequantizes. It builds a graph of lazy arrays, so nothing is read or
computed until a tensor is taken. This module knows how to build that graph; it knows nothing of files that are written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_map, tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, mixed_quant_predicate_builder
from mlx_lm.utils import (
    compute_bits_per_weight,
    dequantize_model,
    get_total_parameters,
    quantize_model,
    save_config,
)

from cluster.core.errors import BadCheckpoint, InvalidOption, ModelUnsupported
from cluster.core.quantization import RECIPES, Quantization
from cluster.model.module_tree import Module, parameters
from cluster.model.skeleton import open_model, shorten

__all__ = ["Conversion", "ConvertedTensor", "ConvertedWeights", "weight_dtypes"]

DTYPES: Final[Mapping[mx.Dtype, str]] = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.uint32: "U32",
    mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
    mx.complex64: "C64",
}  # fmt: skip
"""The safetensors format's name of each of MLX's types."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to do with the weights.

    ``dtype`` is MLX's name of the type for weights that are not quantized; "" means the config's, else the stored one.
    ``recipe`` is one of mlx-lm's recipes of mixed bits, or "". Without ``quantization`` there is no recipe.
    """

    quantization: Quantization | None = None
    recipe: str = ""
    dtype: str = ""
    dequantize: bool = False

    def __post_init__(self) -> None:
        if self.quantization and self.dequantize:
            raise InvalidOption("a conversion either quantizes or dequantizes; drop one of them", field="dequantize")
        if self.recipe and self.recipe not in RECIPES:
            raise InvalidOption(
                f"unknown recipe {self.recipe!r}; choose one of {', '.join(RECIPES)}", field="quant_predicate"
            )
        if self.recipe and self.quantization and self.quantization.mode != "affine":
            raise InvalidOption(
                f"recipe {self.recipe} needs the mode affine, not {self.quantization.mode}", field="quant_predicate"
            )
        if self.dtype and self.dtype not in MODEL_CONVERSION_DTYPES:
            raise InvalidOption(
                f"unknown type {self.dtype!r}; choose one of {', '.join(MODEL_CONVERSION_DTYPES)}", field="dtype"
            )


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
    convert it so) and BadCheckpoint.
    """

    def __init__(self, path: Path, conversion: Conversion) -> None:
        model, config = open_model(path)
        with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
            model, self.config = _convert(model, config, conversion)
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


def weight_dtypes() -> tuple[str, ...]:
    """Return MLX's names of the types that weights can be converted to."""
    return tuple(MODEL_CONVERSION_DTYPES)


def _convert(model: Module, config: dict[str, Any], conversion: Conversion) -> tuple[Module, dict[str, Any]]:
    """Do what mlx-lm's ``convert`` does between loading and saving, in its order."""
    try:
        predicate = _predicate(model, conversion)
        _cast(model, conversion.dtype or _config_dtype(config))
        if conversion.quantization:
            wanted = conversion.quantization
            return quantize_model(
                model, config, wanted.group_size, wanted.bits, mode=wanted.mode, quant_predicate=predicate
            )
        if conversion.dequantize:
            config.pop("quantization", None)
            config.pop("quantization_config", None)
            model = dequantize_model(model)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:  # raised by the model's own code
        raise ModelUnsupported(f"mlx-lm cannot convert this model so: {_describe_error(error)}") from error
    return model, config


def _describe_error(error: Exception) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__)


def _predicate(model: Module, conversion: Conversion) -> Callable[..., Any] | None:
    """Return the recipe's choice of bits for each module. None means the model's own choice, if it has one."""
    if not conversion.recipe or not conversion.quantization:
        return None
    built: Callable[..., Any] = mixed_quant_predicate_builder(
        conversion.recipe, model, conversion.quantization.group_size
    )
    return built


def _config_dtype(config: Mapping[str, Any]) -> str:
    """Return the type that the config names; "" if it names none or one that weights are not converted to."""
    nested = config.get("text_config") or {}
    named = config.get("torch_dtype") or (nested.get("dtype") if isinstance(nested, Mapping) else None)
    return named if named in MODEL_CONVERSION_DTYPES else ""


def _cast(model: Module, dtype: str) -> None:
    """Cast all weights but those that the model keeps in another type."""
    if not dtype:
        return
    target: mx.Dtype = getattr(mx, dtype)
    is_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        return array.astype(target) if is_cast(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))  # type: ignore[no-untyped-call]


def _drop_parameters(model: Module) -> None:
    """Remove the arrays from the model, which would else keep every tensor that was computed."""
    model.update(tree_map(lambda _: mx.zeros(()), model.parameters()))  # type: ignore[no-untyped-call]


def _describe(name: str, array: mx.array) -> ConvertedTensor:
    return ConvertedTensor(name, DTYPES[array.dtype], tuple(array.shape), array.nbytes)
