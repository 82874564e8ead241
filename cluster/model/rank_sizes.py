"""Computes what one rank of a group holds of a model: the shape's figures, of a model that mlx-lm has sharded.

The layers' weights and caches are those of the sharded skeleton. What a token reads and computes of a layer shrinks as
its weights do. No weights are read, and there is no group: a sum of all ranks has the shape of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from cluster.core.plan import ModelShape, RankSizes, SharedWeight
from cluster.model.cache_size import CacheSizes
from cluster.model.kv_quantization import KVQuantization
from cluster.model.module_tree import Module, module_arrays, named_modules
from cluster.model.sharding import Seat, require_shardable, shard_model
from cluster.model.trace import Trace

__all__ = ["read_rank_sizes"]


def read_rank_sizes(
    model: Module, traced: Trace, shape: ModelShape, quantization: KVQuantization | None, ranks: int
) -> RankSizes:
    """Return the sizes of one of ``ranks`` ranks. ``model`` is a skeleton of ``shape``, and of no use afterwards.

    Raises as ``require_shardable``.
    """
    require_shardable(model, ranks)
    shard_model(model, Seat(0, ranks))
    layer_bytes = tuple(
        sum(array.nbytes for _, module in named_modules(layer) for array in module_arrays(module))
        for layer in model.layers
    )
    shares = [own / whole if whole else 1.0 for own, whole in zip(layer_bytes, shape.layer_bytes, strict=True)]
    with _without_collectives(ranks):
        sizes = CacheSizes(model, traced, quantization)
    lengths = [*(tokens for tokens, _ in shape.cache_curve), shape.max_context]
    *shorter, full = [sizes.of_sequence(tokens, shape.max_chunk) for tokens in lengths]
    return RankSizes(
        ranks=ranks,
        layer_bytes=layer_bytes,
        cache_bytes=full,
        shared=_shared(model, shape),
        cache_curve=tuple(zip(lengths, shorter, strict=False)),
        mark_curve=tuple((tokens, sizes.of_mark(tokens)) for tokens, _ in shape.mark_curve),
        active_bytes=_scale(shape.active_bytes, shares),
        expert_bytes=_scale(shape.expert_bytes, shares),
        flops=tuple(flops * share for flops, share in zip(shape.flops, shares, strict=True)),
        heads=-(-shape.heads // ranks),
    )


def _shared(model: Module, shape: ModelShape) -> tuple[SharedWeight, ...]:
    """Return the modules outside the layers, of which sharding cuts few."""
    modules = dict(named_modules(model))
    return tuple(
        replace(weight, nbytes=sum(array.nbytes for array in module_arrays(modules[weight.name])))
        for weight in shape.shared
    )


def _scale(sizes: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(size * share) for size, share in zip(sizes, shares, strict=True))


@contextmanager
def _without_collectives(ranks: int) -> Iterator[None]:
    """Let a model run, inside the block, that is sharded for ranks which do not exist."""
    module: Any = mx.distributed
    original = module.all_sum, module.all_gather
    module.all_sum = lambda array, **_: array
    module.all_gather = lambda array, **_: mx.concatenate([array] * ranks)
    try:
        yield
    finally:
        module.all_sum, module.all_gather = original
