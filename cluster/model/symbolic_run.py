"""Runs a whole model symbolically and records each layer's caches and return value.

The recorded arrays are lazy: they cost time to build but no memory. It knows nothing of cuts or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from cluster.model.module_tree import Module
from cluster.model.pytree import flatten

__all__ = ["LayerCall", "Recording", "record", "replace_calls"]

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer. ``caches`` are the indices of the caches among its arguments.

    ``template`` and ``arrays`` are the return value as ``flatten`` splits it.
    """

    layer: int
    caches: frozenset[int]
    template: Any
    arrays: list[mx.array]


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run. ``caches`` is mlx-lm's list after it; ``logits`` has shape [rows, length, vocabulary]."""

    length: int
    calls: list[LayerCall]
    caches: list[Any]
    logits: mx.array


@contextmanager
def replace_calls(layers: Sequence[Module], call_of: Callable[[int, Call], Call]) -> Iterator[None]:
    """Replace the call of each layer i, inside the block, by ``call_of(i, original_call)``."""
    classes = [type(layer) for layer in layers]
    try:
        for i, layer in enumerate(layers):
            replace_call(layer, call_of(i, classes[i].__call__))
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def replace_call(layer: Module, call: Call) -> None:
    """Replace the call of this one layer by ``call``.

    Python looks ``__call__`` up on the class, so the layer gets a new subclass of its class, with the same name.
    Attributes and ``isinstance`` checks still work.
    """
    cls = type(layer)
    layer.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def record(model: Module, length: int, warm: int = 0, rows: int = 1, before: Sequence[Any] | None = None) -> Recording:
    """Run ``rows`` sequences of ``length`` tokens through the model symbolically, after ``warm`` tokens of context.

    ``before`` are the initial caches, new ones by default.
    """
    caches = make_prompt_cache(model) if before is None else list(before)
    calls: list[LayerCall] = []
    index = {id(cache): i for i, cache in enumerate(caches)}

    def recorded(layer: int, own: Call) -> Call:
        def call(self: Module, *args: Any, **kwargs: Any) -> Any:
            used = frozenset(index[id(v)] for v in (*args, *kwargs.values()) if id(v) in index)
            value = own(self, *args, **kwargs)
            calls.append(LayerCall(layer, used, *flatten(value)))
            return value

        return call

    with replace_calls(model.layers, recorded):
        if warm:
            model(mx.zeros((rows, warm), mx.int32), cache=caches)
            calls.clear()
        out = model(mx.zeros((rows, length), mx.int32), cache=caches)
    return Recording(length, calls, caches, out[0] if isinstance(out, tuple) else out)
