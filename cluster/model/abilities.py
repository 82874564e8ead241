"""What the caches of a model can do: share a batch, be trimmed. Found by looking at them, and by trying.

A trial is symbolic, so it reads no weight. It knows mlx-lm's caches; it knows nothing of stages or sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from mlx_lm.models.cache import CacheList, make_prompt_cache

from cluster.model.modules import Module, stand_ins
from cluster.model.recording import Recording, record
from cluster.model.trace import Boundary, Trace

__all__ = ["batchable", "trimmable"]

RAGGED: Final = (5, 9)
"""Tokens of the two sequences that try to share a batch: longer than what any model remembers by tokens (n-grams)."""
BATCH_METHODS: Final = ("extend", "filter", "extract")
WINDOWS: Final = ("max_size", "chunk_size")
"""What caches call the tokens that they keep, where they do not keep all."""


def batchable(model: Module, traced: Trace) -> bool:
    """Whether sequences of different lengths can be rows of one batch, in every cache and at every clean cut."""
    with stand_ins(model):
        try:
            return _shares(model, traced)
        except Exception:  # model code raises whatever an array of offsets makes it raise: it cannot do this
            return False


def trimmable(model: Module, context: int) -> bool:
    """Whether every cache can forget any number of its last tokens, of as many as ``context``."""
    return all(_forgets(cache, context) for cache in make_prompt_cache(model))


def _shares(model: Module, traced: Trace) -> bool:
    alone = [record(model, length).caches for length in RAGGED]
    if not all(_merges(cache) for cache in alone[0]):
        return False
    together = [caches[0].merge(list(caches)) for caches in zip(*alone, strict=True)]
    if not all(_changes(cache) for cache in together):
        return False
    run = record(model, 1, rows=len(RAGGED), before=together)
    return run.logits.shape == (len(RAGGED), 1, traced.vocabulary) and all(
        _fits(run, cut, traced.boundaries[cut]) for cut in traced.clean
    )


def _merges(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(_merges(part) for part in cache.caches)
    return hasattr(cache, "merge") and not getattr(cache, "keep", 0)  # a batch forgets which tokens never rotate out


def _changes(batch: Any) -> bool:
    if isinstance(batch, CacheList):
        return all(_changes(part) for part in batch.caches)
    return all(hasattr(batch, method) for method in BATCH_METHODS)


def _fits(run: Recording, cut: int, boundary: Boundary) -> bool:
    """Whether what crosses the cut has a row for each sequence."""
    crossing = [run.calls[cut - 1].arrays[i].shape for i in boundary.kept]
    return all(_rows(shape, leaf.dims) for shape, leaf in zip(crossing, boundary.leaves, strict=True))


def _rows(shape: Sequence[int], dims: Sequence[int | str | None]) -> bool:
    known = {"batch": len(RAGGED), "length": 1}
    expected = [known.get(dim) if isinstance(dim, str) else dim for dim in dims]
    return len(shape) == len(dims) and all(e in (None, size) for e, size in zip(expected, shape, strict=True))


def _forgets(cache: Any, context: int) -> bool:
    if isinstance(cache, CacheList):
        return all(_forgets(part, context) for part in cache.caches)
    windows = [size for name in WINDOWS if (size := getattr(cache, name, None)) is not None]
    return bool(cache.is_trimmable()) and all(size > context for size in windows)
