"""Finds out whether a model's caches can share a batch and be trimmed, by inspection and by trial runs.

A trial run is symbolic: it reads no weights. It knows mlx-lm's caches, nothing of stages or sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import CacheList, make_prompt_cache

from cluster.model.marks import WINDOWS
from cluster.model.module_tree import Module, zero_parameters
from cluster.model.symbolic_run import Recording, record
from cluster.model.trace import Boundary, Trace

__all__ = ["batchable", "trimmable"]

RAGGED: Final = ((5, 9), (5, 9, 7))
"""Sequence lengths, in tokens, of the two trial batches. They exceed the token history (n-grams) of any model.

Two trials are needed: a mask whose shape is wrong for a batch (gemma2) passes if there are as many rows as heads.
"""
BATCH_METHODS: Final = ("extend", "filter", "extract")


def batchable(model: Module, traced: Trace) -> bool:
    """Return whether sequences of different lengths can share a batch, in every cache and at every clean cut."""
    with zero_parameters(model):
        try:
            return all(_can_share_batch(model, traced, lengths) for lengths in RAGGED)
        except Exception:  # model code may raise anything when it meets an array of offsets: not batchable
            return False


def trimmable(model: Module, context: int) -> bool:
    """Return whether every cache can drop any number of its last tokens, up to a length of ``context`` tokens."""
    return all(_is_trimmable(cache, context) for cache in make_prompt_cache(model))


def _can_share_batch(model: Module, traced: Trace, lengths: Sequence[int]) -> bool:
    rows = len(lengths)
    single_caches = [record(model, length).caches for length in lengths]
    if not all(_is_mergeable(cache) for cache in single_caches[0]):
        return False
    merged_caches = [caches[0].merge(list(caches)) for caches in zip(*single_caches, strict=True)]
    if not all(_has_batch_methods(cache) for cache in merged_caches):
        return False
    with _record_rope_offsets() as offsets:
        run = record(model, 1, rows=rows, before=merged_caches)
    if not all(isinstance(offset, mx.array) and offset.size == rows for offset in offsets):
        return False
    return run.logits.shape == (rows, 1, traced.vocabulary) and all(
        _cut_has_rows(run, rows, cut, traced.boundaries[cut]) for cut in traced.clean
    )


@contextmanager
def _record_rope_offsets() -> Iterator[list[Any]]:
    """Record the offsets of all rotary embeddings inside the block.

    A model may compute an offset from the size of a buffer (afm7's last layers do). That size is the same for rows of
    unequal length, so the batch runs but its results are wrong.
    """
    offsets: list[Any] = []
    rope = mx.fast.rope

    def recording_rope(*args: Any, offset: Any, **kwargs: Any) -> mx.array:
        offsets.append(offset)
        return rope(*args, offset=offset, **kwargs)

    mx.fast.rope = recording_rope
    try:
        yield offsets
    finally:
        mx.fast.rope = rope


def _is_mergeable(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(_is_mergeable(part) for part in cache.caches)
    return hasattr(cache, "merge") and not getattr(cache, "keep", 0)  # a batched cache ignores ``keep``


def _has_batch_methods(batch: Any) -> bool:
    if isinstance(batch, CacheList):
        return all(_has_batch_methods(part) for part in batch.caches)
    return all(hasattr(batch, method) for method in BATCH_METHODS)


def _cut_has_rows(run: Recording, rows: int, cut: int, boundary: Boundary) -> bool:
    """Return whether the arrays that cross the cut have a row for each sequence."""
    crossing = [run.calls[cut - 1].arrays[i].shape for i in boundary.kept]
    return all(_shape_matches(shape, rows, leaf.dims) for shape, leaf in zip(crossing, boundary.leaves, strict=True))


def _shape_matches(shape: Sequence[int], rows: int, dims: Sequence[int | str | None]) -> bool:
    known = {"batch": rows, "length": 1}
    expected = [known.get(dim) if isinstance(dim, str) else dim for dim in dims]
    return len(shape) == len(dims) and all(e in (None, size) for e, size in zip(expected, shape, strict=True))


def _is_trimmable(cache: Any, context: int) -> bool:
    if isinstance(cache, CacheList):
        return all(_is_trimmable(part, context) for part in cache.caches)
    windows = [size for name in WINDOWS if (size := getattr(cache, name, None)) is not None]
    return bool(cache.is_trimmable()) and all(size > context for size in windows)
