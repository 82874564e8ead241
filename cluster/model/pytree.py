"""A layer's return value, taken apart into arrays and put together again.

Layers return an array, a tuple of arrays, a dict, or a small object that carries arrays. What crosses a cut is the
arrays; the template of the rest is the same on both sides. It knows nothing of layers or frames.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from cluster.model.module_tree import Module

__all__ = ["put_together", "take_apart"]


@dataclass(frozen=True, slots=True)
class Hole:
    """Where array ``index`` goes."""

    index: int


def take_apart(value: Any) -> tuple[Any, list[mx.array]]:
    """-> a template with a Hole for each array, and the arrays in order. ``value`` is left as it was."""
    arrays: list[mx.array] = []

    def dig(leaf: Any) -> Any:
        if not isinstance(leaf, mx.array):
            return leaf
        arrays.append(leaf)
        return Hole(len(arrays) - 1)

    return _map(value, dig), arrays


def put_together(template: Any, arrays: list[mx.array | None]) -> Any:
    """Fill the holes; a hole whose array is None (it did not cross the cut) becomes None."""
    return _map(template, lambda leaf: arrays[leaf.index] if isinstance(leaf, Hole) else leaf)


def _map(part: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested containers with ``change`` applied to everything in them that is none.

    It recurs by itself: a closure that called itself would be a ring of references that holds its arrays until the
    collector comes by.
    """
    if isinstance(part, (tuple, list)):
        items = [_map(item, change) for item in part]
        return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)
    if isinstance(part, dict) and not isinstance(part, Module):
        return {key: _map(item, change) for key, item in part.items()}
    if _carries_arrays(part):
        twin = copy.copy(part)
        for name, item in vars(part).items():
            setattr(twin, name, _map(item, change))
        return twin
    return change(part)


def _carries_arrays(part: Any) -> bool:
    """A plain object such as kimi_k3's ResidualBlocks, but no array, hole, module, class or function."""
    plain = hasattr(part, "__dict__") and not callable(part)
    return plain and not isinstance(part, (mx.array, Hole, Module, type))
