"""Computes a model's shape for placement: the bytes of each layer and its cache, and where the model may be cut.

Everything is computed on the skeleton; no weights are read. It knows bytes, nothing of workers or speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from cluster.core import limits
from cluster.core.errors import InvalidOption
from cluster.core.plan import ModelRef, ModelShape, SharedWeight
from cluster.model.cache_abilities import batchable, trimmable
from cluster.model.cache_size import cache_curve, mark_curve
from cluster.model.checkpoint import open_checkpoint
from cluster.model.kv_quantization import choose_quantization
from cluster.model.module_tree import Module, module_arrays, named_modules
from cluster.model.skeleton import open_skeleton
from cluster.model.token_cost import TokenCost, watch
from cluster.model.trace import Trace, trace

__all__ = ["read_shape"]

CURVE: Final = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536, 131072)
"""Sequence lengths, in tokens, at which the curve of cache sizes is sampled."""
CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""Config keys of the longest context that a model was trained for, the most common first."""


def read_shape(path: Path, name: str, max_context: int | None, *, kv_bits: int = 0) -> ModelShape:
    """Return the shape of the checkpoint in ``path``, whose display name is ``name``.

    ``max_context`` is in tokens; None means the model's limit, at most limits.DEFAULT_MAX_CONTEXT. ``kv_bits`` is 4 or
    8 to quantize keys and values, else 0. Raises InvalidOption if ``max_context`` exceeds the model's limit,
    ModelUnsupported if the model cannot be sliced or quantized, and the errors of ``open_checkpoint``.
    """
    checkpoint = open_checkpoint(path)
    context = _context(checkpoint.config, max_context)
    model = open_skeleton(path)
    traced = trace(model)
    quantization = choose_quantization(model, kv_bits)
    activity = watch(model, {cut: boundary.kept for cut, boundary in traced.boundaries.items()})
    layers = _layers(model, traced)
    lengths = _lengths(context)
    *shorter, full = cache_curve(model, traced, lengths, quantization)
    can_trim = trimmable(model, context)
    marks = [] if can_trim else mark_curve(model, traced, lengths)
    return ModelShape(
        model=ModelRef(name, str(path), checkpoint.fingerprint),
        layers=traced.layers,
        layer_bytes=tuple(_layer_bytes(layer) for layer in model.layers),
        cache_bytes=full,
        shared=_shared_weights(model, traced, activity),
        clean_cuts=traced.clean,
        unclean=tuple(sorted(traced.unclean.items())),
        max_context=context,
        cache_curve=tuple(zip(lengths, shorter, strict=False)),
        batchable=quantization is None and batchable(model, traced),
        trimmable=can_trim,
        mark_curve=tuple(zip(lengths, marks, strict=False)),
        vocabulary=traced.vocabulary,
        active_bytes=tuple(round(_sum(layer, activity.read_bytes)) for layer in layers),
        expert_bytes=tuple(round(_sum(layer, activity.expert_bytes)) for layer in layers),
        flops=tuple(_sum(layer, activity.flops) for layer in layers),
        boundary_bytes=(0, *activity.crossing[:-1]),
    )


def _lengths(context: int) -> list[int]:
    """Return the lengths of the curve of cache sizes: ``context`` last, and dense where sequences are short."""
    return [*(n for n in CURVE if n < context), context]


def _context(config: Mapping[str, Any], asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise InvalidOption(f"invalid context of {asked} tokens: it must be at least 1", field="max_context")
    limit = _context_limit(config)
    if asked is not None and limit is not None and asked > limit:
        raise InvalidOption(f"invalid context of {asked} tokens: the model allows at most {limit}", field="max_context")
    wanted = asked or limits.DEFAULT_MAX_CONTEXT
    return wanted if limit is None else min(wanted, limit)


def _context_limit(config: Mapping[str, Any]) -> int | None:
    """Return the model's own limit; None if its config has none (as for state-space models)."""
    nested = config.get("text_config")
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        named = [source[key] for key in CONTEXT_KEYS if isinstance(source.get(key), int)]
        if named:
            return int(named[0])
    return None


def _layer_bytes(layer: Module) -> int:
    return sum(array.nbytes for _, module in named_modules(layer) for array in module_arrays(module))


def _layers(model: Module, traced: Trace) -> list[list[tuple[str, Module]]]:
    """Return the modules of each layer with their paths from the model."""
    return [
        [(".".join(filter(None, (prefix, path))), module) for path, module in named_modules(layer)]
        for prefix, layer in zip(traced.prefixes, model.layers, strict=True)
    ]


def _sum(layer: list[tuple[str, Module]], of: Callable[[str, Module], float]) -> float:
    return sum(of(path, module) for path, module in layer)


def _shared_weights(model: Module, traced: Trace, activity: TokenCost) -> tuple[SharedWeight, ...]:
    modules = dict(named_modules(model))
    return tuple(
        SharedWeight(
            name,
            sum(array.nbytes for array in module_arrays(modules[name])),
            tuple(sorted(layers)),
            activity.lookup_bytes(modules[name]),
            name in activity.heads,
        )
        for name, layers in traced.shared.items()
    )
