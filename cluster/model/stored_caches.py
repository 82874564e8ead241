"""Takes the caches of a kept prefix apart into pieces for a disk, and builds caches from such pieces.

A piece belongs to one leaf: a cache of one layer, or a part of a CacheList. A cache that only grows is kept by rows:
each piece has those of some tokens. Of any other cache, a piece has its whole state at one length. Pieces do not
depend on how the layers are cut into stages. It knows mlx-lm's caches; it reads and writes no file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache

from cluster.core.errors import PrefixMissing
from cluster.core.frames import Tensor
from cluster.model.caches import SequenceCaches
from cluster.model.kv_quantization import BITS, GROUPS
from cluster.model.marks import CacheMark, can_rewind, rewind
from cluster.model.tensor_codec import dtype_name, pack

__all__ = ["CacheBuilder", "StoredPiece", "leaf_names", "take_rows", "take_state"]

_GROWING: Final = (KVCache, QuantizedKVCache)
_ROWS: Final = ("keys", "values")
_PLAIN: Final = (bool, int, float, str, type(None))
Leaves = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A leaf's rows or state: ``kind`` is the cache's class, ``values`` its attributes, ``tensors`` their arrays.

    In ``values``, an array is ``["array", index]``, and lists and tuples are ``["list" or "tuple", items...]``.
    """

    kind: str
    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(memoryview(tensor.data).nbytes for tensor in self.tensors)


def leaf_names(caches: SequenceCaches) -> tuple[str, ...]:
    """Return the names of all leaves of a stage: the cache's number in mlx-lm's list, ``t`` before it for a tracker."""
    return tuple(_leaves(caches))


def take_rows(caches: SequenceCaches, leaf: str, start: int, end: int) -> StoredPiece | None:
    """Return a leaf's rows of the tokens ``start`` to ``end``; None if it is not kept by rows.

    The caches must hold at least ``end`` tokens.
    """
    cache = _leaves(caches)[leaf]
    if not _is_growing(cache):
        return None
    arrays: list[mx.array] = []
    values = {name: _encode(_cut(getattr(cache, name), start, end), arrays) for name in _ROWS}
    if isinstance(cache, QuantizedKVCache):
        values |= {"group_size": cache.group_size, "bits": cache.bits}
    return _pack(cache, values, arrays)


def take_state(caches: SequenceCaches, leaf: str, excess: int, mark: CacheMark | None) -> StoredPiece | None:
    """Return a leaf's state before the last ``excess`` tokens; None if it is kept by rows, or cannot be had.

    ``mark`` is of that position, None if there is none.
    """
    cache = _leaves(caches)[leaf]
    if _is_growing(cache):
        return None
    if excess:
        state = _states(caches, mark)[leaf] if mark else None
        if not can_rewind(cache, state):
            return None
        cache = rewind(copy.deepcopy(cache), excess, state)
    arrays: list[mx.array] = []
    try:
        values = {name: _encode(value, arrays) for name, value in vars(cache).items()}
    except TypeError:
        return None
    return _pack(cache, values, arrays)


@dataclass(slots=True)
class CacheBuilder:
    """Builds the caches of one sequence. Each method takes a bounded time, so that other work goes on in between."""

    caches: SequenceCaches
    _first: StoredPiece | None = None
    _arrays: list[list[mx.array]] = field(default_factory=list)

    def add_rows(self, piece: StoredPiece, count: int) -> None:
        """Add the next ``count`` rows of the leaf that is being built.

        Raises PrefixMissing if they are not as many, or of another form than the ones before.
        """
        if self._first and _form(piece) != _form(self._first):
            raise PrefixMissing("the rows of a prefix differ in their form")
        arrays = [_unpack(tensor) for tensor in piece.tensors]
        if not all(array.ndim > 1 and array.shape[-2] == count for array in arrays):
            raise PrefixMissing("the prefix on disk is incomplete: rows are missing")
        mx.eval(arrays)
        self._first = self._first or piece
        self._arrays.append(arrays)

    def end_rows(self, leaf: str, length: int) -> None:
        """Put the rows together as a leaf of ``length`` tokens. Raises PrefixMissing if it is another kind of cache."""
        first, parts = self._first, self._arrays
        self._first, self._arrays = None, []
        if first is None:
            raise PrefixMissing("a prefix has no rows of a cache")
        cache = self._empty(leaf, first)
        whole = [mx.concatenate(list(same), axis=-2) for same in zip(*parts, strict=True)]
        mx.eval(whole)
        for name in _ROWS:
            setattr(cache, name, _decode(first.values.get(name), whole))
        cache.offset = length
        _replace(self.caches, leaf, cache)

    def _empty(self, leaf: str, piece: StoredPiece) -> Any:
        blank = _leaves(self.caches)[leaf]
        if type(blank) is not KVCache or piece.kind not in {kind.__name__ for kind in _GROWING}:
            raise PrefixMissing("a prefix has another kind of cache")
        if piece.kind == KVCache.__name__:
            return blank
        group_size, bits = piece.values.get("group_size"), piece.values.get("bits")
        if group_size not in GROUPS or bits not in BITS:
            raise PrefixMissing("a prefix has another kind of cache")
        return QuantizedKVCache(group_size=int(group_size), bits=int(bits))

    def set_state(self, leaf: str, piece: StoredPiece) -> None:
        """Set a leaf's state. Raises PrefixMissing if it is another kind of cache."""
        cache = _leaves(self.caches)[leaf]
        if type(cache).__name__ != piece.kind or vars(cache).keys() != piece.values.keys():
            raise PrefixMissing("a prefix has another kind of cache")
        arrays = [_unpack(tensor) for tensor in piece.tensors]
        mx.eval(arrays)
        for name, value in piece.values.items():
            cache.__dict__[name] = _decode(value, arrays)


def _leaves(caches: SequenceCaches) -> Leaves:
    """Return each cache, or part of one, that is not a CacheList."""
    return {name: leaf for root, cache in caches.named() for name, leaf in _parts_of(root, cache)}


def _parts_of(name: str, cache: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(cache, CacheList):
        for i, part in enumerate(cache.caches):
            yield from _parts_of(f"{name}.{i}", part)
    else:
        yield name, cache


def _states(caches: SequenceCaches, mark: CacheMark) -> Leaves:
    """Return what a mark has of each leaf, None for one that is trimmed instead."""
    pairs = zip(caches.named(), mark.states, strict=True)
    return {name: kept for (root, cache), state in pairs for name, kept in _states_of(root, cache, state)}


def _states_of(name: str, cache: Any, state: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(cache, CacheList):
        for i, part in enumerate(cache.caches):
            yield from _states_of(f"{name}.{i}", part, state[i] if state is not None else None)
    else:
        yield name, state


def _replace(caches: SequenceCaches, leaf: str, cache: Any) -> None:
    root, *inner = leaf.split(".")
    if not inner:
        caches.replace(root, cache)
        return
    holder = dict(caches.named())[root]
    for i in inner[:-1]:
        holder = holder.caches[int(i)]
    parts = list(holder.caches)
    parts[int(inner[-1])] = cache
    holder.caches = type(holder.caches)(parts)


def _is_growing(cache: Any) -> bool:
    """Return whether a cache is kept by rows. A cache that no layer has used yet has none."""
    return type(cache) in _GROWING and cache.keys is not None


def _cut(tree: Any, start: int, end: int) -> Any:
    if isinstance(tree, mx.array):
        return tree[..., start:end, :]
    return tuple(_cut(part, start, end) for part in tree)


def _pack(cache: Any, values: Mapping[str, Any], arrays: Sequence[mx.array]) -> StoredPiece:
    """Copy the arrays to memory of their own. Evaluates them."""
    whole = [mx.contiguous(array) for array in arrays]
    mx.eval(whole)
    tensors = (pack(a) if a.size else Tensor(dtype_name(a.dtype), tuple(a.shape), b"") for a in whole)
    return StoredPiece(type(cache).__name__, values, tuple(tensors))


def _form(piece: StoredPiece) -> tuple[Any, ...]:
    """Return everything that must be equal in two pieces of one leaf's rows."""
    shapes = tuple((tensor.dtype, (*tensor.shape[:-2], tensor.shape[-1])) for tensor in piece.tensors)
    return piece.kind, repr(sorted(piece.values.items())), shapes


def _encode(value: Any, arrays: list[mx.array]) -> Any:
    """Return a plain value for one of a cache's. Raises TypeError if it has something that cannot be stored."""
    if isinstance(value, mx.array):
        arrays.append(value)
        return ["array", len(arrays) - 1]
    if type(value) in (list, tuple):
        return [type(value).__name__, *(_encode(part, arrays) for part in value)]
    if type(value) not in _PLAIN:
        raise TypeError(f"a {type(value).__name__} cannot be stored")
    return value


def _decode(value: Any, arrays: Sequence[mx.array]) -> Any:
    """Return the value that was encoded. Raises PrefixMissing if it is invalid."""
    match value:
        case ["array", int(index)] if 0 <= index < len(arrays):
            return arrays[index]
        case ["list", *parts]:
            return [_decode(part, arrays) for part in parts]
        case ["tuple", *parts]:
            return tuple(_decode(part, arrays) for part in parts)
        case bool() | int() | float() | str() | None:
            return value
    raise PrefixMissing("a prefix has a value of an unknown form")


def _unpack(tensor: Tensor) -> mx.array:
    dtype = getattr(mx, tensor.dtype, None)
    data = memoryview(tensor.data)
    if not isinstance(dtype, mx.Dtype) or data.nbytes != prod(tensor.shape) * dtype.size:
        raise PrefixMissing("the size of a stored array does not match its shape")
    if not data.nbytes:
        return mx.zeros(tensor.shape, dtype)
    raw: Any = data.cast("B")
    return mx.array(raw).view(dtype).reshape(tensor.shape)
