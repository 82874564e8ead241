"""Computes the bytes of a sequence's caches and marks on each layer, from mlx-lm's own caches, evaluating none.

A short symbolic run fills the caches. They are then grown, symbolically, to the context's length in the worst way that
the scheduler's chunks allow. The cost of this does not depend on the length. It knows nothing of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from cluster.core import limits
from cluster.model.kv_quantization import KVQuantization
from cluster.model.marks import needs_mark
from cluster.model.module_tree import Module, tree_bytes, zero_parameters
from cluster.model.symbolic_run import record
from cluster.model.trace import LENGTHS, Trace

__all__ = ["CacheSizes"]


class CacheSizes:
    """Upper bounds of the bytes of one sequence's caches on each layer of a model.

    A cache that several layers use is charged to the first of them. A cache that no layer is called with is charged to
    the first layer and to the last, since both keep it.
    """

    def __init__(self, model: Module, traced: Trace, quantization: KVQuantization | None = None) -> None:
        self._traced, self._quantization = traced, quantization
        self._pairs = _caches_of_two_runs(model)

    def of_sequence(self, tokens: int, max_chunk: int) -> tuple[int, ...]:
        """Return the bytes at ``tokens`` tokens, for a prompt in any chunks of up to ``max_chunk`` tokens."""
        sizes = [_at(tokens, copy.deepcopy(a), b, max_chunk, self._quantization) for a, b in self._pairs]
        return _bytes_per_layer(self._traced, sizes)

    def of_mark(self, tokens: int) -> tuple[int, ...]:
        """Return the bytes of a mark at ``tokens`` tokens."""
        return _bytes_per_layer(self._traced, [_mark_at(tokens, copy.deepcopy(a), b) for a, b in self._pairs])


def _caches_of_two_runs(model: Module) -> list[tuple[Any, Any]]:
    """Return each cache of the model as a short and a longer run leave it."""
    with zero_parameters(model):
        short, long = (record(model, length).caches for length in LENGTHS)
    return list(zip(short, long, strict=True))


def _bytes_per_layer(traced: Trace, sizes: Sequence[int]) -> tuple[int, ...]:
    """Charge each cache's bytes to its layer."""
    charged = [0] * traced.layers
    for cache, size in enumerate(sizes):
        users = [layer for layer, caches in enumerate(traced.layer_caches) if cache in caches]
        for layer in users[:1] or {0, traced.layers - 1}:
            charged[layer] += size
    return tuple(charged)


def _at(tokens: int, short: Any, long: Any, max_chunk: int, quantization: KVQuantization | None = None) -> int:
    """Return the bytes of a cache at ``tokens`` tokens, from its states after the two runs."""
    if isinstance(short, CacheList):
        return sum(_at(tokens, a, b, max_chunk) for a, b in zip(short.caches, long.caches, strict=True))
    if isinstance(getattr(short, "keys", None), mx.array) and hasattr(short, "update_and_fetch"):
        rows = short.keys, short.values
        cache = short if quantization is None else quantization.apply(short)
        return _measure_growth(tokens, cache, *rows, max_chunk=max_chunk)
    short_bytes, long_bytes = (tree_bytes(cache.state) for cache in (short, long))
    bytes_per_token = -(-(long_bytes - short_bytes) // (LENGTHS[1] - LENGTHS[0]))  # rounded up
    return long_bytes + max(0, bytes_per_token) * max(0, tokens - LENGTHS[1])


def _mark_at(tokens: int, short: Any, long: Any) -> int:
    """Return the bytes of what a mark at ``tokens`` tokens keeps of a cache."""
    if isinstance(short, CacheList):
        return sum(_mark_at(tokens, a, b) for a, b in zip(short.caches, long.caches, strict=True))
    if not needs_mark(short):
        return 0
    window = getattr(short, "max_size", None)
    if window is None or not isinstance(short.keys, mx.array):
        return _at(tokens, short, long, limits.PREFILL_CHUNK)
    row_bytes = tree_bytes([short.keys, short.values]) // int(short.keys.shape[2])
    return row_bytes * int(min(window, tokens + KVCache.step - 1))


def _measure_growth(tokens: int, cache: Any, keys: mx.array, values: mx.array, *, max_chunk: int) -> int:
    """Grow a cache of rows like ``keys`` and ``values``, and return its bytes: all but one chunk first, then the chunk.

    A buffer grows in whole blocks from its current end, so it may exceed its tokens by up to one block minus one token.
    A rotating cache holds its window minus one token and the whole last chunk until the next token arrives.
    """
    longest = tokens + KVCache.step - 1
    chunk = min(max_chunk, tokens)
    for part in (longest - chunk - LENGTHS[0], chunk):
        if part > 0:
            if hasattr(cache, "maybe_trim_front"):
                cache.maybe_trim_front()
            cache.update_and_fetch(_blank(keys, part), _blank(values, part))
    return tree_bytes([cache.keys, cache.values])


def _blank(like: mx.array, tokens: int) -> mx.array:
    batch, heads, _, size = like.shape
    return mx.zeros((batch, heads, tokens, size), like.dtype)
