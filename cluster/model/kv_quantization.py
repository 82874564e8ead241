"""Whether and how a model's keys and values can be kept in 4 or 8 bits, found by trying it symbolically.

The caches are mlx-lm's own QuantizedKVCache, and when they begin is as in its ``generate_step`` with
``quantized_kv_start=0``: the step that fills an empty cache still reads what it has just computed, every later one
reads quantized keys and values. It knows caches of a whole model, nothing of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlx_lm.models.cache import ArraysCache

from cluster.core.errors import InvalidOption, ModelUnsupported
from cluster.model.module_tree import Module, stand_ins
from cluster.model.symbolic_run import record

__all__ = ["KVQuantization", "choose_quantization"]

BITS: Final = (4, 8)
GROUPS: Final = (64, 32)
"""Numbers that share a scale, the preferred size first; a head's width has to be a multiple of it."""
CONTEXT: Final = 3
"""Tokens before the trial steps; any small number will do."""


@dataclass(frozen=True, slots=True)
class KVQuantization:
    """``bits`` of each number, and how many numbers share a scale."""

    bits: int
    group_size: int

    def apply(self, cache: Any) -> Any:
        """The cache in so many bits, or itself where it holds no keys and values or has been quantized."""
        if not hasattr(cache, "to_quantized"):
            return cache
        return cache.to_quantized(group_size=self.group_size, bits=self.bits)


def choose_quantization(model: Module, kv_bits: int) -> KVQuantization | None:
    """How to keep the model's keys and values in ``kv_bits`` bits; None for 0, which means as they are.

    Raises InvalidOption for other numbers than 0, 4 and 8, and ModelUnsupported for a model that cannot do it.
    """
    if kv_bits == 0:
        return None
    if kv_bits not in BITS:
        raise InvalidOption(f"keys and values can be kept in 4 or 8 bits, not in {kv_bits}", field="kv_bits")
    with stand_ins(model):
        caches = record(model, CONTEXT).caches
        _require_plain(caches)
        chosen = KVQuantization(kv_bits, _group_size(caches))
        for length in (1, CONTEXT):
            _try(model, length, chosen)
    return chosen


def _require_plain(caches: Sequence[Any]) -> None:
    """Caches that grow with the context must be plain ones; recurrent states stay as they are."""
    growing = [cache for cache in caches if not isinstance(cache, ArraysCache)]
    for cache in growing:
        if not hasattr(cache, "to_quantized") or hasattr(cache, "max_size"):
            raise ModelUnsupported(
                f"keys and values of this model cannot be quantized: it uses a {type(cache).__name__}, for which "
                "mlx-lm has no quantized form; load it without kv_bits"
            )
    if not growing:
        raise ModelUnsupported("this model keeps no keys and values that could be quantized; load it without kv_bits")


def _group_size(caches: Sequence[Any]) -> int:
    """The largest group that divides the width of every head."""
    filled = [cache for cache in caches if not isinstance(cache, ArraysCache)]
    widths = sorted({array.shape[-1] for cache in filled for array in (cache.keys, cache.values)})
    for group in GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    raise ModelUnsupported(
        f"keys and values of this model cannot be quantized: its heads are {' and '.join(map(str, widths))} wide, and "
        f"only multiples of {GROUPS[-1]} can be; load it without kv_bits"
    )


def _try(model: Module, length: int, chosen: KVQuantization) -> None:
    before = [chosen.apply(cache) for cache in record(model, CONTEXT).caches]
    try:
        record(model, length, before=before)
    except Exception as error:  # model code raises whatever quantized keys make it raise
        raise ModelUnsupported(
            f"the attention of this model cannot read quantized keys and values ({type(error).__name__}: "
            f"{str(error)[:200]}); load it without kv_bits"
        ) from error
