"""MLX modules as this room reads them: their paths, the arrays they own, and stand-ins for those arrays.

mlx.nn's ``Module`` is a dict of arrays and children whose methods carry no types; this module gives them some. It
knows trees of modules, and nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module  # type checkers cannot see it as nn.Module
from mlx.utils import tree_flatten

__all__ = [
    "Module",
    "layer_prefixes",
    "module_arrays",
    "named_modules",
    "parameters",
    "stand_ins",
    "tree_arrays",
    "tree_bytes",
]


def named_modules(model: Module) -> list[tuple[str, Module]]:
    """Every module with its path from ``model``, itself included (with an empty path)."""
    found: list[tuple[str, Module]] = model.named_modules()  # type: ignore[no-untyped-call]
    return found


def parameters(model: Module) -> dict[str, mx.array]:
    """Path -> parameter, as MLX's checkpoints name them."""
    paths: Any = tree_flatten(model.parameters())  # type: ignore[no-untyped-call]
    return dict(paths)


def tree_arrays(tree: Any) -> list[mx.array]:
    """The arrays in nested lists, tuples and dicts; each step asks for every cache's. MLX's own names each leaf too."""
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        return [array for part in tree.values() for array in tree_arrays(part)]
    if isinstance(tree, (list, tuple)):
        return [array for part in tree for array in tree_arrays(part)]
    return []


def tree_bytes(tree: Any) -> int:
    """Bytes of those arrays, evaluated or not."""
    return sum(array.nbytes for array in tree_arrays(tree))


def module_arrays(module: Module) -> list[mx.array]:
    """The arrays that ``module`` itself owns, private ones (``_freqs``) too, without its children's."""
    return [value for value in module.values() if isinstance(value, mx.array)]


def layer_prefixes(model: Module) -> tuple[str, ...]:
    """The module path of each layer, in order."""
    names = {id(module): name for name, module in named_modules(model)}
    return tuple(names.get(id(layer), f"?{i}") for i, layer in enumerate(model.layers))


@contextmanager
def stand_ins(model: Module) -> Iterator[None]:
    """For a while, every parameter is a broadcast zero of its shape and dtype: evaluated, and four bytes in size.

    So the graph of a run has evaluated leaves, and a forward that evaluates something on its way (a router's choice)
    finds something to evaluate. Models keep derived arrays on themselves as they run: everything is put back.
    """
    saved = [(module, dict(module), dict(vars(module))) for _, module in named_modules(model)]
    try:
        for module, items, _ in saved:
            for key, value in items.items():
                if isinstance(value, mx.array) and not key.startswith("_"):
                    dict.__setitem__(module, key, mx.broadcast_to(mx.zeros((), value.dtype), value.shape))
        mx.eval(parameters(model))
        yield
    finally:
        for module, items, attributes in saved:
            dict.clear(module)
            dict.update(module, items)
            vars(module).clear()
            vars(module).update(attributes)
