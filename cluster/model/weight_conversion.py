"""Converts a model's lazy weights: casts, quantizes or dequantizes them with mlx-lm's code, in mlx-lm's order.

Nothing is computed here: the arrays stay lazy. It knows modules and arrays, nothing of files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, mixed_quant_predicate_builder
from mlx_lm.utils import dequantize_model, quantize_model

from cluster.core.adapter import AdapterRef
from cluster.core.errors import InvalidOption, ModelUnsupported
from cluster.core.quantization import RECIPES, Quantization
from cluster.model.library_errors import describe_error
from cluster.model.module_tree import Module

__all__ = ["Conversion", "convert_model"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to do with the weights.

    ``dtype`` is MLX's name of the type for weights that are not quantized; "" means the config's, else the stored one.
    ``recipe`` is one of mlx-lm's recipes of mixed bits, or "". Without ``quantization`` there is no recipe.
    ``adapter`` is fused into the weights before that, as ``mlx_lm.fuse`` does; they then keep their types.
    """

    quantization: Quantization | None = None
    recipe: str = ""
    dtype: str = ""
    dequantize: bool = False
    adapter: AdapterRef | None = None

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


def convert_model(model: Module, config: dict[str, Any], conversion: Conversion) -> tuple[Module, dict[str, Any]]:
    """Do what mlx-lm's ``convert`` does between loading and saving. Return the model and its new config.

    The model is modified. Raises ModelUnsupported if mlx-lm cannot convert it so, and InvalidOption if all of it is
    quantized otherwise already.
    """
    try:
        predicate = _predicate(model, conversion)
        if not conversion.adapter:
            _cast(model, conversion.dtype or _config_dtype(config))
        if conversion.quantization:
            return _quantize(model, config, conversion.quantization, predicate)
        if conversion.dequantize:
            config.pop("quantization", None)
            config.pop("quantization_config", None)
            model = dequantize_model(model)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:  # raised by the model's own code
        raise ModelUnsupported(f"mlx-lm cannot convert this model so: {describe_error(error)}") from error
    return model, config


def _quantize(
    model: Module, config: dict[str, Any], wanted: Quantization, predicate: Callable[..., Any] | None
) -> tuple[Module, dict[str, Any]]:
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        quantized: tuple[Module, dict[str, Any]] = quantize_model(
            model, config, wanted.group_size, wanted.bits, mode=wanted.mode, quant_predicate=predicate
        )
    _require_quantized(config, quantized[1], wanted, bool(predicate))
    return quantized


def _require_quantized(
    before: Mapping[str, Any], after: Mapping[str, Any], wanted: Quantization, is_mixed: bool
) -> None:
    """Raise InvalidOption if nothing was left to quantize, and the weights are not as ``wanted``.

    mlx-lm leaves quantized weights as they are. It quantizes the rest of a model, such as all but gpt-oss's experts,
    and then notes each matrix in the config.
    """
    old = before.get("quantization")
    if not old or old != after["quantization"]:
        return
    found = Quantization(old["bits"], old["group_size"], old.get("mode", "affine"))
    if found != wanted or is_mixed:
        raise InvalidOption(
            f"the model is quantized to {found} already, so it cannot be quantized to "
            f"{'mixed bits' if is_mixed else wanted}; leave out --bits and the other options that quantize, or "
            "dequantize it first with --dequantize",
            field="bits",
        )


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
