"""What the caches of a model can do: share a batch, be trimmed. Found by looking at them, and by trying.

A trial is symbolic, so it reads no weight. It knows mlx-lm's caches; it knows nothing of stages or sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import CacheList, make_prompt_cache

from cluster.model.module_tree import Module, stand_ins
from cluster.model.symbolic_run import Recording, record
from cluster.model.trace import Boundary, Trace

__all__ = ["batchable", "trimmable"]

RAGGED: Final = ((5, 9), (5, 9, 7))
"""Tokens of the sequences that try to share a batch, longer than what any model remembers by tokens (n-grams).

Two trials: a mask that is wrongly shaped for a batch (gemma2) goes through where there are as many rows as heads.
"""
BATCH_METHODS: Final = ("extend", "filter", "extract")
WINDOWS: Final = ("max_size", "chunk_size")
"""What caches call the tokens that they keep, where they do not keep all."""


def batchable(model: Module, traced: Trace) -> bool:
    """Whether sequences of different lengths can be rows of one batch, in every cache and at every clean cut."""
    with stand_ins(model):
        try:
            return all(_shares(model, traced, lengths) for lengths in RAGGED)
        except Exception:  # model code raises whatever an array of offsets makes it raise: it cannot do this
            return False


def trimmable(model: Module, context: int) -> bool:
    """Whether every cache can forget any number of its last tokens, of as many as ``context``."""
    return all(_forgets(cache, context) for cache in make_prompt_cache(model))


def _shares(model: Module, traced: Trace, lengths: Sequence[int]) -> bool:
    rows = len(lengths)
    alone = [record(model, length).caches for length in lengths]
    if not all(_merges(cache) for cache in alone[0]):
        return False
    together = [caches[0].merge(list(caches)) for caches in zip(*alone, strict=True)]
    if not all(_changes(cache) for cache in together):
        return False
    with _rotations() as offsets:
        run = record(model, 1, rows=rows, before=together)
    if not all(isinstance(offset, mx.array) and offset.size == rows for offset in offsets):
        return False
    return run.logits.shape == (rows, 1, traced.vocabulary) and all(
        _fits(run, rows, cut, traced.boundaries[cut]) for cut in traced.clean
    )


@contextmanager
def _rotations() -> Iterator[list[Any]]:
    """The offsets of all rotary embeddings meanwhile.

    A model may take one from the size of a buffer (afm7's last layers do), which is the same for rows of unequal
    length: it runs, and is wrong.
    """
    offsets: list[Any] = []
    rope = mx.fast.rope

    def noted(*args: Any, offset: Any, **kwargs: Any) -> mx.array:
        offsets.append(offset)
        return rope(*args, offset=offset, **kwargs)

    mx.fast.rope = noted
    try:
        yield offsets
    finally:
        mx.fast.rope = rope


def _merges(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(_merges(part) for part in cache.caches)
    return hasattr(cache, "merge") and not getattr(cache, "keep", 0)  # a batch forgets which tokens never rotate out


def _changes(batch: Any) -> bool:
    if isinstance(batch, CacheList):
        return all(_changes(part) for part in batch.caches)
    return all(hasattr(batch, method) for method in BATCH_METHODS)


def _fits(run: Recording, rows: int, cut: int, boundary: Boundary) -> bool:
    """Whether what crosses the cut has a row for each sequence."""
    crossing = [run.calls[cut - 1].arrays[i].shape for i in boundary.kept]
    return all(_rows(shape, rows, leaf.dims) for shape, leaf in zip(crossing, boundary.leaves, strict=True))


def _rows(shape: Sequence[int], rows: int, dims: Sequence[int | str | None]) -> bool:
    known = {"batch": rows, "length": 1}
    expected = [known.get(dim) if isinstance(dim, str) else dim for dim in dims]
    return len(shape) == len(dims) and all(e in (None, size) for e, size in zip(expected, shape, strict=True))


def _forgets(cache: Any, context: int) -> bool:
    if isinstance(cache, CacheList):
        return all(_forgets(part, context) for part in cache.caches)
    windows = [size for name in WINDOWS if (size := getattr(cache, name, None)) is not None]
    return bool(cache.is_trimmable()) and all(size > context for size in windows)
