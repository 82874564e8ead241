"""Holds the caches of a sequence or a batch on one stage, and builds the full cache list that the model expects.

The caches are mlx-lm's own, created by the model. The entry of a layer on another stage is an alias of a local cache of
the same kind, or a tracker: a cache of one number per token. Models read masks and offsets from these entries, so a
tracker must advance with the tokens. Every stage therefore holds a cache of each kind in the model, and all stages
agree on what can be trimmed.
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
from cluster.model.marks import CacheMark, can_rewind, needs_mark, rewind
from cluster.model.module_tree import Module, tree_arrays, tree_bytes
from cluster.model.trace import Trace

__all__ = ["BatchCaches", "CacheLayout", "HeldCaches", "SequenceCaches"]

_SIZES = ("max_size", "keep", "chunk_size", "window_size")
"""Attributes that make two caches of one class behave differently."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Selects the caches that a stage keeps, as indices into mlx-lm's list.

    ``own`` are the caches of the stage's layers, and one of each kind that stays empty. ``trackers`` are kept as
    trackers. ``view`` maps each entry of mlx-lm's list to an index into (own + trackers). ``quantization`` applies to
    ``own`` only; trackers are small.
    """

    own: tuple[int, ...]
    trackers: tuple[int, ...]
    view: tuple[int, ...]
    quantization: KVQuantization | None = None

    @classmethod
    def of(
        cls, model: Module, traced: Trace, layers: LayerRange, quantization: KVQuantization | None = None
    ) -> CacheLayout:
        """Lay out the caches of a stage with ``layers``. Raises ModelUnsupported for a cache that cannot be tracked."""
        blank = make_prompt_cache(model)
        kinds = [(i in traced.idle, *_kind(cache)) for i, cache in enumerate(blank)]
        own = _own_caches(traced, layers)
        first_of_kind = {kinds[i]: i for i in reversed(own)}
        extra = []
        for i, kind in enumerate(kinds):
            if kind not in first_of_kind:
                first_of_kind[kind] = i
                extra.append(i)
        own += tuple(i for i in extra if i in traced.idle)
        trackers = tuple(i for i in extra if i not in traced.idle)
        for i in trackers:
            _require_trackable(blank[i])
        held = own + trackers
        view = tuple(held.index(i if i in own else first_of_kind[kind]) for i, kind in enumerate(kinds))
        return cls(own, trackers, view, quantization)


class HeldCaches:
    """Holds the caches of one sequence or one batch: ``held`` has the stage's own caches, then the trackers."""

    def __init__(self, layout: CacheLayout, held: list[Any]) -> None:
        self._layout = layout
        self._held = held

    def view(self) -> list[Any]:
        """Return the cache list for a call of the model."""
        return [self._held[i] for i in self._layout.view]

    def follow(self, batch: int, tokens: int) -> None:
        """Advance the trackers by ``tokens`` tokens of ``batch`` rows, and quantize caches that were just filled."""
        own = len(self._layout.own)
        for tracker in self._held[own:]:
            _advance_tracker(tracker, batch, tokens)
        if self._layout.quantization is not None:
            self._held[:own] = [self._layout.quantization.apply(cache) for cache in self._held[:own]]

    def named(self) -> list[tuple[str, Any]]:
        """Return each cache with a name that does not depend on the cut: its number in mlx-lm's list.

        A tracker's name begins with ``t``.
        """
        names = (*map(str, self._layout.own), *(f"t{i}" for i in self._layout.trackers))
        return list(zip(names, self._held, strict=True))

    def replace(self, name: str, cache: Any) -> None:
        """Put ``cache`` in place of the one with that name."""
        self._held[[known for known, _ in self.named()].index(name)] = cache

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate after a step."""
        return tree_arrays([cache.state for cache in self._held])

    def own_arrays(self) -> list[mx.array]:
        """Return the arrays of the stage's own caches, without the trackers (8 bytes a token)."""
        return tree_arrays([cache.state for cache in self._held[: len(self._layout.own)]])

    @property
    def nbytes(self) -> int:
        """Return the bytes of the stage's own caches."""
        return tree_bytes(self.own_arrays())


class SequenceCaches(HeldCaches):
    """The caches of one sequence on one stage."""

    @classmethod
    def new(cls, model: Module, layout: CacheLayout) -> Self:
        """Create empty caches."""
        blank = make_prompt_cache(model)
        return cls(layout, [blank[i] for i in (*layout.own, *layout.trackers)])

    def copy(self) -> SequenceCaches:
        """Return a copy that shares the arrays' memory until one of the two writes.

        Caches write in place (``keys[..., a:b, :] = new``). Such a write gives the array object a new value and does
        not change other objects that refer to the old value. A deep copy creates a new object for each array but
        copies no data, so the copies never see each other's writes.
        """
        return SequenceCaches(self._layout, copy.deepcopy(self._held))

    def mark(self) -> CacheMark:
        """Return a mark of the current position."""
        return CacheMark(self._held)

    @property
    def need_marks(self) -> bool:
        """Return whether a cache cannot always be trimmed. It is the same for all sequences of a stage."""
        return any(needs_mark(cache) for cache in self._held)

    def rewind(self, tokens: int, mark: CacheMark | None) -> bool:
        """Drop the last ``tokens`` tokens in place. ``mark`` must be of the position before them.

        Without a mark, every cache is trimmed. Return False, with no change, if a cache cannot be trimmed then.
        """
        states = mark.states if mark is not None else (None,) * len(self._held)
        pairs = list(zip(self._held, states, strict=True))
        if not all(can_rewind(cache, state) for cache, state in pairs):
            return False
        self._held = [rewind(cache, tokens, state) for cache, state in pairs]
        return True


class BatchCaches(HeldCaches):
    """The caches of several sequences, one row each, as mlx-lm's batch caches: shorter rows are padded on the left.

    Each change is evaluated cache by cache, so that at most one cache exists twice at a time.
    """

    @classmethod
    def merge(cls, parts: Sequence[SequenceCaches]) -> Self:
        """Create a batch with a row for each of ``parts``. Consumes ``parts``."""
        layout = parts[0]._layout
        held: list[Any] = []
        for i in range(len(parts[0]._held)):
            caches = [part._held[i] for part in parts]
            _pad_token_states(caches)
            held.append(caches[0].merge(caches))
            mx.eval(held[i].state)
            for part in parts:
                part._held[i] = None
        return cls(layout, held)

    def extend(self, parts: Sequence[SequenceCaches]) -> None:
        """Add a row for each of ``parts``. Consumes ``parts``."""
        more = BatchCaches.merge(parts)
        for i, cache in enumerate(self._held):
            _pad_token_states([cache, more._held[i]])
            cache.extend(more._held[i])
            mx.eval(cache.state)
            more._held[i] = None

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only ``rows``, in this order."""
        for cache in self._held:
            cache.filter(list(rows))
            mx.eval(cache.state)

    def extract(self, row: int) -> SequenceCaches:
        """Return a copy of one row, without padding."""
        single = SequenceCaches(self._layout, [_extract(cache, row) for cache in self._held])
        mx.eval(single.arrays())
        return single


def _own_caches(traced: Trace, layers: LayerRange) -> tuple[int, ...]:
    """Return the caches of the stage's layers. The first and last stage also keep caches that no layer uses."""
    own = set[int]().union(*traced.layer_caches[layers.start : layers.end])
    if layers.start == 0 or layers.end == traced.layers:
        own |= set(range(traced.caches)).difference(*traced.layer_caches)
    return tuple(sorted(own))


def _kind(cache: Any) -> tuple[Any, ...]:
    """Return a key of the cache's kind: caches of one kind give the same masks and offsets after the same tokens."""
    if isinstance(cache, CacheList):
        return ("CacheList", *(_kind(part) for part in cache.caches))
    return (type(cache).__name__, *(getattr(cache, name, None) for name in _SIZES))


def _require_trackable(cache: Any) -> None:
    if isinstance(cache, CacheList):
        for part in cache.caches:
            _require_trackable(part)
    elif not (isinstance(cache, ArraysCache) or hasattr(cache, "update_and_fetch") or hasattr(cache, "update_window")):
        raise ModelUnsupported(f"this model's {type(cache).__name__} cannot be tracked by macpipe; use another model")


def _advance_tracker(cache: Any, batch: int, tokens: int) -> None:
    """Advance one tracker as the layers that it represents would."""
    if isinstance(cache, CacheList):
        for part in cache.caches:
            _advance_tracker(part, batch, tokens)
    elif isinstance(cache, ArraysCache):
        for i, state in enumerate(cache.cache):
            cache[i] = mx.zeros((batch, 1)) if state is None else state
        cache.advance(tokens)  # type: ignore[no-untyped-call]
    elif hasattr(cache, "update_and_fetch"):
        one = mx.zeros((batch, 1, tokens, 1))
        cache.update_and_fetch(one, one)
    else:  # deepseek_v41's LayerCache
        cache.update_window(mx.zeros((batch, tokens, 1)))


def _pad_token_states(caches: Sequence[Any]) -> None:
    """Pad token histories (int [rows, tokens]) with zeros on the left, to the columns of the longest one.

    A model that reads the last n tokens treats zeros as the tokens before the start (longcat_flash_ngram).
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
    """Extract one row. Replaces mlx-lm's ``extract``, which fails for an ArraysCache with an empty state."""
    if isinstance(cache, CacheList):
        return CacheList(*(_extract(part, row) for part in cache.caches))  # type: ignore[no-untyped-call]
    if isinstance(cache, ArraysCache):
        single = ArraysCache(len(cache.cache))
        single.cache = [None if state is None else mx.contiguous(state[row : row + 1]) for state in cache.cache]
        return single
    return cache.extract(row)
