"""Splits a layer's return value into arrays and a template, and rebuilds it.

Layers return an array, a tuple of arrays, a dict, or a small object that contains arrays. Only the arrays cross a cut;
the template is the same on both sides. It knows nothing of layers or frames.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from cluster.model.module_tree import Module

__all__ = ["flatten", "unflatten"]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The place of array ``index`` in a template."""

    index: int


def flatten(value: Any) -> tuple[Any, list[mx.array]]:
    """Return a template with a Placeholder for each array, and the arrays in order. ``value`` is not changed."""
    arrays: list[mx.array] = []

    def take_array(leaf: Any) -> Any:
        if not isinstance(leaf, mx.array):
            return leaf
        arrays.append(leaf)
        return Placeholder(len(arrays) - 1)

    return _map(value, take_array), arrays


def unflatten(template: Any, arrays: list[mx.array | None]) -> Any:
    """Return the value with its arrays in place. One that is None (it did not cross the cut) stays None."""
    return _map(template, lambda leaf: arrays[leaf.index] if isinstance(leaf, Placeholder) else leaf)


def _map(part: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of nested containers with ``change`` applied to every leaf.

    This is a plain function because a recursive closure is a reference cycle: it would hold its arrays until the
    garbage collector runs.
    """
    if isinstance(part, (tuple, list)):
        items = [_map(item, change) for item in part]
        return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)
    if isinstance(part, dict) and not isinstance(part, Module):
        return {key: _map(item, change) for key, item in part.items()}
    if _carries_arrays(part):
        copied = copy.copy(part)
        for name, item in vars(part).items():
            setattr(copied, name, _map(item, change))
        return copied
    return change(part)


def _carries_arrays(part: Any) -> bool:
    """Return whether ``part`` is a plain object (kimi_k3's ResidualBlocks), no array, module or callable."""
    plain = hasattr(part, "__dict__") and not callable(part)
    return plain and not isinstance(part, (mx.array, Placeholder, Module, type))
