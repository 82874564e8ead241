"""Typed access to MLX module trees: paths, the arrays that a module owns, and stand-ins for those arrays.

mlx.nn's ``Module`` is a dict of arrays and children, and its methods are untyped. This module adds the types. It knows
trees of modules, nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module  # type checkers do not see nn.Module
from mlx.utils import tree_flatten

__all__ = [
    "Module",
    "layer_prefixes",
    "module_arrays",
    "named_modules",
    "parameters",
    "replace_parameters",
    "trainable_parameters",
    "tree_arrays",
    "tree_bytes",
    "zero_parameters",
]


def named_modules(model: Module) -> list[tuple[str, Module]]:
    """Return every module with its path from ``model``; ``model`` itself has the empty path."""
    found: list[tuple[str, Module]] = model.named_modules()  # type: ignore[no-untyped-call]
    return found


def parameters(model: Module) -> dict[str, mx.array]:
    """Return the parameters by path, named as in MLX's checkpoints."""
    paths: Any = tree_flatten(model.parameters())  # type: ignore[no-untyped-call]
    return dict(paths)


def trainable_parameters(model: Module) -> dict[str, mx.array]:
    """Return the parameters that training changes, by path."""
    paths: Any = tree_flatten(model.trainable_parameters())  # type: ignore[no-untyped-call]
    return dict(paths)


def tree_arrays(tree: Any) -> list[mx.array]:
    """Return the arrays in nested lists, tuples and dicts.

    Every step calls this for every cache. ``tree_flatten`` of MLX is slower, since it also builds a name for each leaf.
    """
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        return [array for part in tree.values() for array in tree_arrays(part)]
    if isinstance(tree, (list, tuple)):
        return [array for part in tree for array in tree_arrays(part)]
    return []


def tree_bytes(tree: Any) -> int:
    """Return the bytes of the arrays in ``tree``, evaluated or not."""
    return sum(array.nbytes for array in tree_arrays(tree))


def module_arrays(module: Module) -> list[mx.array]:
    """Return the arrays that ``module`` itself owns, also private ones (``_freqs``), without those of its children."""
    return [value for value in module.values() if isinstance(value, mx.array)]


def layer_prefixes(model: Module) -> tuple[str, ...]:
    """Return the module path of each layer, in order."""
    names = {id(module): name for name, module in named_modules(model)}
    return tuple(names.get(id(layer), f"?{i}") for i, layer in enumerate(model.layers))


@contextmanager
def replace_parameters(model: Module, replace: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Replace every parameter, inside the block, by what ``replace`` returns for it, and evaluate these.

    Models store derived arrays as attributes while they run, or replace modules; at the end everything is restored.
    """
    saved = [(module, dict(module), dict(vars(module))) for _, module in named_modules(model)]
    try:
        for module, items, _ in saved:
            for key, value in items.items():
                if isinstance(value, mx.array) and not key.startswith("_"):
                    dict.__setitem__(module, key, replace(value))
        mx.eval(parameters(model))
        yield
    finally:
        for module, items, attributes in saved:
            dict.clear(module)
            dict.update(module, items)
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def zero_parameters(model: Module) -> Iterator[None]:
    """Replace every parameter, inside the block, by an evaluated broadcast zero of its shape and dtype (four bytes).

    The graph of a run then has evaluated leaves, and a forward pass that evaluates an intermediate value (a router's
    choice) works.
    """
    with replace_parameters(model, lambda value: mx.broadcast_to(mx.zeros((), value.dtype), value.shape)):
        yield
