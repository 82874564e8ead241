"""Computes a model's shape for placement: the bytes of each layer and its cache, and where the model may be cut.

Everything is computed on the skeleton; no weights are read. It knows bytes, nothing of workers or speed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from cluster.core import limits
from cluster.core.errors import InvalidOption, ModelUnsupported, NoPlan
from cluster.core.plan import ModelRef, ModelShape, SharedWeight
from cluster.model.cache_abilities import batchable, trimmable
from cluster.model.cache_size import CacheSizes
from cluster.model.checkpoint import open_checkpoint
from cluster.model.kv_quantization import choose_quantization
from cluster.model.module_tree import Module, module_arrays, named_modules
from cluster.model.rank_sizes import read_rank_sizes
from cluster.model.skeleton import open_skeleton
from cluster.model.token_cost import TokenCost, watch
from cluster.model.trace import Trace, trace

__all__ = ["read_shape"]

CURVE: Final = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536, 131072)
"""Sequence lengths, in tokens, at which the curve of cache sizes is sampled."""
CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""Config keys of the longest context that a model was trained for, the most common first."""


HEADS_KEYS: Final = ("num_attention_heads", "num_heads", "n_heads", "n_head")
"""Config keys of the number of attention heads, the most common first."""


def read_shape(
    path: Path,
    name: str,
    max_context: int | None,
    *,
    kv_bits: int = 0,
    weight_bits: int = 0,
    prefill_chunk: int | None = None,
    default_context: int = limits.DEFAULT_MAX_CONTEXT,
    ranks: Collection[int] = (),
    possible_ranks: Collection[int] = (),
) -> ModelShape:
    """Return the shape of the checkpoint in ``path``, whose display name is ``name``.

    ``max_context`` is in tokens; None means the model's limit, at most ``default_context``. ``kv_bits`` is 4 or 8 to
    quantize keys and values, else 0. ``weight_bits`` are those of weights that are quantized while they are
    loaded; 0 means as they are stored. ``prefill_chunk`` is the number of tokens per prompt chunk; None lets them
    vary. ``ranks`` are the numbers of workers that share each layer as a group, ``possible_ranks`` those that could if
    the model allows it. Raises InvalidOption if ``max_context`` exceeds the model's limit or the tensors of a chunk a
    frame's, ModelUnsupported if the model cannot be sliced, quantized or shared, NoPlan if it cannot be shared by so
    many, and the errors of ``open_checkpoint``.
    """
    checkpoint = open_checkpoint(path)
    context = _context(checkpoint.config, name, max_context, default_context)
    model = open_skeleton(path, weight_bits)
    traced = trace(model)
    quantization = choose_quantization(model, kv_bits)
    activity = watch(model, {cut: boundary.kept for cut, boundary in traced.boundaries.items()})
    layers = _layers(model, traced)
    lengths = _lengths(context)
    sizes, can_trim = CacheSizes(model, traced, quantization), trimmable(model, context)
    max_chunk = _max_chunk(prefill_chunk, max(activity.crossing), partial(sizes.of_sequence, context))
    *shorter, full = [sizes.of_sequence(n, max_chunk) for n in lengths]
    marks = [] if can_trim else [sizes.of_mark(n) for n in lengths]
    shape = ModelShape(
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
        heads=_first_number(checkpoint.config, HEADS_KEYS) or 0,
        max_chunk=max_chunk,
    )
    parts = [read_rank_sizes(open_skeleton(path, weight_bits), traced, shape, quantization, n) for n in sorted(ranks)]
    for n in sorted(set(possible_ranks) - set(ranks)):
        with suppress(ModelUnsupported, NoPlan):
            parts.append(read_rank_sizes(open_skeleton(path, weight_bits), traced, shape, quantization, n))
    return replace(shape, rank_sizes=tuple(parts))


def _max_chunk(asked: int | None, boundary_bytes: int, cache_bytes: Callable[[int], tuple[int, ...]]) -> int:
    """Return the most tokens per chunk: those asked for, or as many as a frame and the caches can hold at little cost.

    ``boundary_bytes`` are those of one token that cross a cut; ``cache_bytes`` are a full sequence's, by chunk.
    """
    sendable = (limits.MAX_FRAME_BYTES - limits.MAX_FRAME_HEADER_BYTES) // max(boundary_bytes, 1)
    if asked is not None and asked > sendable:
        raise InvalidOption(
            f"invalid prefill chunk of {asked} tokens: stages of this model can exchange at most {sendable} at once",
            field="prefill_chunk",
        )
    if asked is not None:
        return asked
    usual = sum(cache_bytes(limits.PREFILL_CHUNK))
    for chunk in (limits.LONG_PREFILL_CHUNK, limits.LONG_PREFILL_CHUNK // 2):
        if chunk <= sendable and sum(cache_bytes(chunk)) <= usual * (1 + limits.LONG_CHUNK_MEMORY):
            return chunk
    return limits.PREFILL_CHUNK


def _lengths(context: int) -> list[int]:
    """Return the lengths of the curve of cache sizes: ``context`` last, and dense where sequences are short."""
    return [*(n for n in CURVE if n < context), context]


def _context(config: Mapping[str, Any], name: str, asked: int | None, default: int) -> int:
    if asked is not None and asked < 1:
        raise InvalidOption(f"invalid context of {asked} tokens for {name}: it must be at least 1", field="max_context")
    limit = _first_number(config, CONTEXT_KEYS)  # None for state-space models, whose configs have none
    if asked is not None and limit is not None and asked > limit:
        raise InvalidOption(f"invalid context of {asked} tokens: {name} allows at most {limit}", field="max_context")
    wanted = asked or default
    return wanted if limit is None else min(wanted, limit)


def _first_number(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Return the first of ``keys`` that the config, or else its text model's part, has as a whole number."""
    nested = config.get("text_config")
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        named = [source[key] for key in keys if isinstance(source.get(key), int)]
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
