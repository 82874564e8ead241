"""Keeps and restores the state of the caches that cannot be trimmed.

A mark is that state at one position of a sequence. Together with the other caches, trimmed to the same position, it is
the whole state of the sequence there. It knows mlx-lm's caches, nothing of sequences or frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from cluster.model.module_tree import tree_arrays

__all__ = ["CacheMark", "can_rewind", "keep_state", "needs_mark", "rewind"]

WINDOWS: Final = ("max_size", "chunk_size")
"""Names of the attribute that holds the number of tokens a cache keeps, if it does not keep all."""


class CacheMark:
    """The state, at one position, of a stage's caches that cannot be trimmed. It shares memory with live caches.

    ``states`` has an entry per cache: its copy, a tuple for the parts of a CacheList, or None if it can be trimmed.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        self.states = tuple(keep_state(cache) for cache in caches)
        mx.eval(self.arrays())

    def arrays(self) -> list[mx.array]:
        return _state_arrays(self.states)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


def needs_mark(cache: Any) -> bool:
    """Return whether a cache, or a part of a CacheList, cannot always be trimmed. Depends on its kind alone."""
    if isinstance(cache, CacheList):
        return any(needs_mark(part) for part in cache.caches)
    return _window(cache) is not None or not cache.is_trimmable()


def keep_state(cache: Any) -> Any:
    """Return a copy of those parts of a cache for which ``needs_mark`` holds; None if there are none.

    The copy shares memory with the cache, except with arrays that are a view of a larger buffer.
    """
    if isinstance(cache, CacheList):
        parts = tuple(keep_state(part) for part in cache.caches)
        return parts if any(part is not None for part in parts) else None
    if not needs_mark(cache):
        return None
    state = copy.deepcopy(cache)
    _drop_expired_rows(state)
    for name, value in vars(state).items():
        vars(state)[name] = _own_memory(value)
    return state


def can_rewind(cache: Any, state: Any) -> bool:
    """Return whether ``rewind`` can take the cache back: to the mark's ``state``, or by trimming if that is None."""
    if isinstance(cache, CacheList):
        states = state or (None,) * len(cache.caches)
        return all(can_rewind(part, kept) for part, kept in zip(cache.caches, states, strict=True))
    return state is not None or (bool(cache.is_trimmable()) and not getattr(cache, "start_position", 0))


def rewind(cache: Any, tokens: int, state: Any) -> Any:
    """Return the cache without its last ``tokens`` tokens: trimmed in place, or a copy of the mark's ``state``.

    ``can_rewind`` must hold.
    """
    if isinstance(cache, CacheList):
        states = state or (None,) * len(cache.caches)
        parts = [rewind(part, tokens, kept) for part, kept in zip(cache.caches, states, strict=True)]
        return CacheList(*parts)  # type: ignore[no-untyped-call]
    if state is not None:
        return copy.deepcopy(state)
    cache.trim(tokens)
    _drop_unused_blocks(cache)
    return cache


def _window(cache: Any) -> int | None:
    return next((size for name in WINDOWS if (size := getattr(cache, name, None)) is not None), None)


def _drop_expired_rows(cache: Any) -> None:
    """Reduce a rotating cache to its window. After a chunk it holds the window minus one token and the whole chunk.

    Its next update would drop the same rows.
    """
    keys = getattr(cache, "keys", None)
    if not hasattr(cache, "_trim") or keys is None or keys.shape[2] <= cache.max_size:
        return
    excess = keys.shape[2] - cache.max_size
    cache.keys, cache.values = cache._trim(excess, cache.keys), cache._trim(excess, cache.values)
    cache._idx = cache.max_size


def _own_memory(value: Any) -> Any:
    """Copy arrays that are a view of a larger buffer, such as a chunk's last tokens: a mark would keep all of it."""
    if isinstance(value, mx.array):
        return mx.contiguous(value)
    return [_own_memory(part) for part in value] if isinstance(value, list) else value


def _drop_unused_blocks(cache: Any) -> None:
    """Cut the end of a buffer of keys and values that has a whole unused block or more after a trim.

    A sequence that starts from the beginning of a long prefix would otherwise copy all of it with its first write.
    """
    if _window(cache) is not None or not hasattr(cache, "step") or getattr(cache, "keys", None) is None:
        return
    used = -(-cache.offset // cache.step) * cache.step
    if tree_arrays(cache.keys)[0].shape[-2] - used >= cache.step:
        cache.keys, cache.values = _first_rows(cache.keys, used), _first_rows(cache.values, used)


def _first_rows(tree: Any, rows: int) -> Any:
    if isinstance(tree, mx.array):
        return tree[..., :rows, :]
    return type(tree)(_first_rows(part, rows) for part in tree)


def _state_arrays(states: Any) -> list[mx.array]:
    if isinstance(states, tuple):
        return [array for state in states for array in _state_arrays(state)]
    return [] if states is None else tree_arrays(states.state)
