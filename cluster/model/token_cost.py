"""Computes what a model reads and computes for one token, by a symbolic run of one token on the skeleton.

A token reads all weights, with two exceptions that the run detects: of stacked experts (mlx-lm's switch layers) it
reads as many as the layer is called with, and of an embedding that is only looked up it reads one row. Experts in
separate modules (dbrx) count as fully read. It knows modules and bytes, nothing of speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.quantized import QuantizedEmbedding
from mlx_lm.models import switch_layers

from cluster.model.module_tree import Module, module_arrays, named_modules, zero_parameters
from cluster.model.symbolic_run import record

__all__ = ["TokenCost", "watch"]

_SWITCHES = (switch_layers.SwitchLinear, switch_layers.QuantizedSwitchLinear)
_EMBEDDINGS = (Embedding, QuantizedEmbedding)


@dataclass(frozen=True, slots=True)
class TokenCost:
    """The cost of one token.

    ``shares`` has, by path, the fraction of each switch layer that a token reads. ``heads`` are the paths of embeddings
    that the model also multiplies with. ``crossing`` has, for each layer, the bytes that cross the cut after it.
    """

    shares: Mapping[str, float]
    heads: frozenset[str]
    crossing: tuple[int, ...]

    def read_bytes(self, path: str, module: Module) -> float:
        """Return the bytes of the module's own arrays that one token reads."""
        return _bytes(module) * self.shares.get(path, 1.0)

    def expert_bytes(self, path: str, module: Module) -> int:
        """Return the bytes of a switch layer's own arrays; 0 for any other module."""
        return _bytes(module) if path in self.shares else 0

    def flops(self, path: str, module: Module) -> float:
        """Return the multiplications and additions of one token with the module's own weights."""
        return 2 * _count_weights(module) * self.shares.get(path, 1.0)

    def lookup_bytes(self, module: Module) -> int | None:
        """Return the bytes of an embedding's row; None for any other module."""
        return sum(a.nbytes // a.shape[0] for a in module_arrays(module)) if isinstance(module, _EMBEDDINGS) else None


def watch(model: Module, kept: Mapping[int, Sequence[int]]) -> TokenCost:
    """Run one token through ``model``. ``kept`` maps a cut to the array indices of the layer's value that cross it."""
    shares: dict[str, float] = {}
    heads: set[str] = set()
    with zero_parameters(model), ExitStack() as stack:
        for path, module in named_modules(model):
            if isinstance(module, _SWITCHES):
                stack.enter_context(_methods(module, __call__=_count_experts(path, module, shares)))
            elif isinstance(module, _EMBEDDINGS):
                stack.enter_context(_methods(module, as_linear=_note_heads(path, module, heads)))
        calls = record(model, 1).calls
    crossing = [sum(call.arrays[i].nbytes for i in kept.get(call.layer + 1, ())) for call in calls]
    return TokenCost(shares, frozenset(heads), tuple(crossing))


@contextmanager
def _methods(module: Module, **methods: Any) -> Any:
    """Replace methods of this one module inside the block. Python looks some up on the class, so it gets a subclass."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **methods})
    try:
        yield
    finally:
        module.__class__ = cls


def _count_experts(path: str, module: Module, shares: dict[str, float]) -> Any:
    call = type(module).__call__
    experts = module["weight"].shape[0]

    def counting(self: Module, x: mx.array, indices: mx.array, *rest: Any, **named: Any) -> Any:
        shares[path] = min(1.0, max(shares.get(path, 0.0), indices.size / experts))
        return call(self, x, indices, *rest, **named)

    return counting


def _note_heads(path: str, module: Module, heads: set[str]) -> Any:
    multiply = getattr(type(module), "as_linear")  # noqa: B009  # the type checker only knows nn.Module

    def noting(self: Module, x: mx.array) -> Any:
        heads.add(path)
        return multiply(self, x)

    return noting


def _bytes(module: Module) -> int:
    return sum(array.nbytes for array in module_arrays(module))


def _count_weights(module: Module) -> int:
    """Count the numbers in a matrix, independent of their bits; 0 for a vector, whose cost is negligible."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return 0
    packed = 32 // module.bits if weight.dtype == mx.uint32 and hasattr(module, "bits") else 1
    return prod(weight.shape) * packed
