"""The caches of one sequence or of a batch on one stage, and the full-length list that the model wants to see.

The caches are mlx-lm's own, made by the model. Entries of layers that live elsewhere alias a local cache of the same
kind, or a tracker: a cache of one number a token that only follows along, for masks and offsets are read off it. So
every stage holds a cache of every kind that the model has, and decides alike what can be trimmed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from cluster.core.errors import ModelUnsupported
from cluster.core.plan import LayerRange
from cluster.model.kv_quantization import KVQuantization
from cluster.model.module_tree import Module, tree_arrays, tree_bytes
from cluster.model.trace import Trace

__all__ = ["BatchCaches", "CacheLayout", "HeldCaches", "SequenceCaches"]

_SIZES = ("max_size", "keep", "chunk_size", "window_size")
"""Attributes that make two caches of one class behave differently."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Which of the model's caches a stage keeps.

    ``own`` are indices into mlx-lm's list: its layers', and one of each kind that stays empty. ``trackers`` are the
    ones kept as trackers; ``view`` says for each entry of that list which of (own + trackers) stands there.
    ``quantization`` is for its own; trackers hold next to nothing.
    """

    own: tuple[int, ...]
    trackers: tuple[int, ...]
    view: tuple[int, ...]
    quantization: KVQuantization | None = None

    @classmethod
    def of(
        cls, model: Module, traced: Trace, layers: LayerRange, quantization: KVQuantization | None = None
    ) -> CacheLayout:
        """Lay out the caches of a stage with these layers. Raises ModelUnsupported for a kind it cannot follow."""
        blank = make_prompt_cache(model)
        kinds = [(i in traced.idle, *_kind(cache)) for i, cache in enumerate(blank)]
        own = _own_caches(traced, layers)
        stands = {kinds[i]: i for i in reversed(own)}
        more = []
        for i, kind in enumerate(kinds):
            if kind not in stands:
                stands[kind] = i
                more.append(i)
        own += tuple(i for i in more if i in traced.idle)
        trackers = tuple(i for i in more if i not in traced.idle)
        for i in trackers:
            _require_followable(blank[i])
        held = own + trackers
        view = tuple(held.index(i if i in own else stands[kind]) for i, kind in enumerate(kinds))
        return cls(own, trackers, view, quantization)


class HeldCaches:
    """The caches that a stage holds for what it computes at once: ``held`` are its own, then the trackers."""

    def __init__(self, layout: CacheLayout, held: list[Any]) -> None:
        self._layout = layout
        self._held = held

    def view(self) -> list[Any]:
        """The list that the model is called with."""
        return [self._held[i] for i in self._layout.view]

    def follow(self, batch: int, tokens: int) -> None:
        """The model has seen so many more tokens: let the trackers know, and quantize what has just begun."""
        own = len(self._layout.own)
        for tracker in self._held[own:]:
            _follow(tracker, batch, tokens)
        if self._layout.quantization is not None:
            self._held[:own] = [self._layout.quantization.apply(cache) for cache in self._held[:own]]

    def arrays(self) -> list[mx.array]:
        """Everything that has to be evaluated after a step."""
        return tree_arrays([cache.state for cache in self._held])

    def own_arrays(self) -> list[mx.array]:
        """The arrays of this stage's own caches. Trackers (8 bytes a token) are left out."""
        return tree_arrays([cache.state for cache in self._held[: len(self._layout.own)]])

    @property
    def nbytes(self) -> int:
        """Bytes of those."""
        return tree_bytes(self.own_arrays())


class SequenceCaches(HeldCaches):
    """One sequence's caches on one stage."""

    @classmethod
    def new(cls, model: Module, layout: CacheLayout) -> Self:
        """Empty ones."""
        blank = make_prompt_cache(model)
        return cls(layout, [blank[i] for i in (*layout.own, *layout.trackers)])

    def copy(self) -> SequenceCaches:
        """A twin that shares the arrays' memory until one of the two writes.

        Caches write in place (``keys[..., a:b, :] = new``), which gives the written array object a new value and
        leaves every other object that held the old one alone. A deep copy makes objects of its own for every array,
        by reference, so what one twin writes the other never sees.
        """
        return SequenceCaches(self._layout, copy.deepcopy(self._held))

    def trimmed(self, tokens: int) -> SequenceCaches | None:
        """A copy without the last ``tokens`` tokens, or None where a cache cannot give them back."""
        twin = self.copy()
        if not all(cache.is_trimmable() for cache in twin._held):
            return None
        return twin if all(cache.trim(tokens) == tokens for cache in twin._held) else None


class BatchCaches(HeldCaches):
    """The caches of several sequences, a row each, in mlx-lm's own batch kinds: shorter rows are padded on the left.

    Every change is evaluated cache by cache, so that no more than one cache is there twice at a time.
    """

    @classmethod
    def merged(cls, parts: Sequence[SequenceCaches]) -> Self:
        """A row for each of ``parts``, which are used up."""
        layout, held = parts[0]._layout, []
        for i in range(len(parts[0]._held)):
            caches = [part._held[i] for part in parts]
            _level(caches)
            held.append(caches[0].merge(caches))
            mx.eval(held[i].state)
            for part in parts:
                part._held[i] = None
        return cls(layout, held)

    def extend(self, parts: Sequence[SequenceCaches]) -> None:
        """Add a row for each of ``parts``, which are used up."""
        more = BatchCaches.merged(parts)
        for i, cache in enumerate(self._held):
            _level([cache, more._held[i]])
            cache.extend(more._held[i])
            mx.eval(cache.state)
            more._held[i] = None

    def keep(self, rows: Sequence[int]) -> None:
        """Have these rows, in this order, and no others."""
        for cache in self._held:
            cache.filter(list(rows))
            mx.eval(cache.state)

    def extract(self, row: int) -> SequenceCaches:
        """A copy of one row, as if that sequence had always been alone."""
        alone = SequenceCaches(self._layout, [_extract(cache, row) for cache in self._held])
        mx.eval(alone.arrays())
        return alone


def _own_caches(traced: Trace, layers: LayerRange) -> tuple[int, ...]:
    """Caches of the stage's layers; the first and the last stage also keep those that no layer is called with."""
    own = set[int]().union(*traced.layer_caches[layers.start : layers.end])
    if layers.start == 0 or layers.end == traced.layers:
        own |= set(range(traced.caches)).difference(*traced.layer_caches)
    return tuple(sorted(own))


def _kind(cache: Any) -> tuple[Any, ...]:
    """Two caches of one kind that have seen the same tokens give the same masks and offsets."""
    if isinstance(cache, CacheList):
        return ("CacheList", *(_kind(part) for part in cache.caches))
    return (type(cache).__name__, *(getattr(cache, name, None) for name in _SIZES))


def _require_followable(cache: Any) -> None:
    if isinstance(cache, CacheList):
        for part in cache.caches:
            _require_followable(part)
    elif not (isinstance(cache, ArraysCache) or hasattr(cache, "update_and_fetch") or hasattr(cache, "update_window")):
        raise ModelUnsupported(f"macpipe does not know how a {type(cache).__name__} counts its tokens")


def _follow(cache: Any, batch: int, tokens: int) -> None:
    """Advance one tracker as the layers that it stands for would."""
    if isinstance(cache, CacheList):
        for part in cache.caches:
            _follow(part, batch, tokens)
    elif isinstance(cache, ArraysCache):
        for i, state in enumerate(cache.cache):
            cache[i] = mx.zeros((batch, 1)) if state is None else state
        cache.advance(tokens)  # type: ignore[no-untyped-call]
    elif hasattr(cache, "update_and_fetch"):
        one = mx.zeros((batch, 1, tokens, 1))
        cache.update_and_fetch(one, one)
    else:  # deepseek_v41's LayerCache
        cache.update_window(mx.zeros((batch, tokens, 1)))


def _level(caches: Sequence[Any]) -> None:
    """Give remembered tokens (int [rows, tokens]) of short sequences as many columns as the longest has, zeros first.

    A model that reads the last n tokens takes zeros for those before the beginning (longcat_flash_ngram).
    """
    if not isinstance(caches[0], ArraysCache):
        return
    for i, states in enumerate(zip(*(cache.cache for cache in caches), strict=True)):
        known = [state for state in states if state is not None]
        if known and known[0].ndim == 2 and mx.issubdtype(known[0].dtype, mx.integer):
            longest = max(state.shape[1] for state in known)
            for cache, state in zip(caches, states, strict=True):
                if state is not None:
                    cache[i] = mx.pad(state, [(0, 0), (longest - state.shape[1], 0)])


def _extract(cache: Any, row: int) -> Any:
    """mlx-lm's ``extract``, which an empty state of an ArraysCache would break."""
    if isinstance(cache, CacheList):
        return CacheList(*(_extract(part, row) for part in cache.caches))  # type: ignore[no-untyped-call]
    if isinstance(cache, ArraysCache):
        alone = ArraysCache(len(cache.cache))
        alone.cache = [None if state is None else mx.contiguous(state[row : row + 1]) for state in cache.cache]
        return alone
    return cache.extract(row)
