"""Chooses how to quantize a model's keys and values to 4 or 8 bits, and tests it with a symbolic run.

The caches are mlx-lm's own QuantizedKVCache. They start as in its ``generate_step`` with ``quantized_kv_start=0``: the
step that fills an empty cache reads unquantized keys and values, every later step reads quantized ones. It knows the
caches of a whole model, nothing of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlx_lm.models.cache import ArraysCache

from cluster.core.errors import InvalidOption, ModelUnsupported
from cluster.model.module_tree import Module, zero_parameters
from cluster.model.symbolic_run import record

__all__ = ["KVQuantization", "choose_quantization"]

BITS: Final = (4, 8)
GROUPS: Final = (64, 32)
"""Group sizes (numbers that share a scale), the preferred size first. A head's width must be a multiple of it."""
CONTEXT: Final = 3
"""Tokens before the trial steps; any small number works."""


@dataclass(frozen=True, slots=True)
class KVQuantization:
    """Bits per number, and how many numbers share a scale."""

    bits: int
    group_size: int

    def apply(self, cache: Any) -> Any:
        """Return the quantized cache; ``cache`` itself if it has no keys and values or is already quantized."""
        if not hasattr(cache, "to_quantized"):
            return cache
        return cache.to_quantized(group_size=self.group_size, bits=self.bits)


def choose_quantization(model: Module, kv_bits: int) -> KVQuantization | None:
    """Return how to quantize the model's keys and values to ``kv_bits`` bits; None for 0 (no quantization).

    Raises InvalidOption unless ``kv_bits`` is 0, 4 or 8. Raises ModelUnsupported if the model does not allow it.
    """
    if kv_bits == 0:
        return None
    if kv_bits not in BITS:
        raise InvalidOption(f"invalid kv_bits {kv_bits}: keys and values can have 4 or 8 bits", field="kv_bits")
    with zero_parameters(model):
        caches = record(model, CONTEXT).caches
        _require_plain(caches)
        chosen = KVQuantization(kv_bits, _group_size(caches))
        for length in (1, CONTEXT):
            _try(model, length, chosen)
    return chosen


def _require_plain(caches: Sequence[Any]) -> None:
    """Raise ModelUnsupported unless all caches that grow with the context are plain. Recurrent states may stay."""
    growing = [cache for cache in caches if not isinstance(cache, ArraysCache)]
    for cache in growing:
        if not hasattr(cache, "to_quantized") or hasattr(cache, "max_size"):
            raise ModelUnsupported(
                f"this model's keys and values cannot be quantized: it uses a {type(cache).__name__}, for which "
                "mlx-lm has no quantized form; load it without kv_bits"
            )
    if not growing:
        raise ModelUnsupported("this model has no keys and values to quantize; load it without kv_bits")


def _group_size(caches: Sequence[Any]) -> int:
    """Return the largest group that divides the width of every head. Raises ModelUnsupported if there is none."""
    filled = [cache for cache in caches if not isinstance(cache, ArraysCache)]
    widths = sorted({array.shape[-1] for cache in filled for array in (cache.keys, cache.values)})
    for group in GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    raise ModelUnsupported(
        f"this model's keys and values cannot be quantized: its heads are {' and '.join(map(str, widths))} wide, "
        f"which must be a multiple of {GROUPS[-1]}; load it without kv_bits"
    )


def _try(model: Module, length: int, chosen: KVQuantization) -> None:
    before = [chosen.apply(cache) for cache in record(model, CONTEXT).caches]
    try:
        record(model, length, before=before)
    except Exception as error:  # model code may raise anything when it meets quantized keys
        raise ModelUnsupported(
            f"this model's attention cannot read quantized keys and values ({type(error).__name__}: "
            f"{str(error)[:200]}); load it without kv_bits"
        ) from error
