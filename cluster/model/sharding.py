"""Splits a model's matrices over the ranks of a group with mlx-lm's own ``shard``.

It knows which models and which numbers of ranks that works for, and says why not. Nothing is computed here: the arrays
stay lazy, also where a model's code would evaluate them. It knows nothing of files, processes or frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from cluster.core.errors import InvalidOption, ModelUnsupported, NoPlan
from cluster.model.library_errors import describe_error
from cluster.model.module_tree import Module, named_modules, replace_parameters

__all__ = ["Group", "Seat", "require_shardable", "shard_model"]


class Group(Protocol):
    """What sharding asks of a group of processes; MLX's groups and a ``Seat`` have it."""

    def rank(self) -> int: ...

    def size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Seat:
    """A place in a group that may not exist yet: rank ``number`` of ``count``."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise InvalidOption(f"invalid rank {self.number} of a group of {self.count}", field="rank")

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


def require_shardable(model: Module, size: int) -> None:
    """Raise unless ``size`` ranks can share each layer of ``model``; nothing is read or changed.

    Raises ModelUnsupported if mlx-lm cannot shard this architecture, and NoPlan if heads, matrices or groups of
    quantized weights are not divisible by ``size``.
    """
    with replace_parameters(model, lambda value: mx.broadcast_to(mx.zeros((), value.dtype), value.shape)):
        shard_model(model, Seat(0, size))


def shard_model(model: Module, group: Group) -> None:
    """Reduce the layers of ``model`` to the part of the group's rank. Raises as ``require_shardable``.

    After an error the model is of no use.
    """
    if not hasattr(model, "shard"):
        raise ModelUnsupported(
            f"mlx-lm cannot share the layers of {_kind(model)} models among several Macs; "
            "give each Mac layers of its own instead"
        )
    before = _dimensions(model)
    try:
        with _all_lazy():
            model.shard(group)
    except (ValueError, AssertionError, ZeroDivisionError) as error:  # raised by mlx-lm, or by MLX for a shape
        raise _indivisible(model, group, describe_error(error)) from error
    for (path, name), (module, size) in before.items():
        if not _divides(size, vars(module).get(name), group.size()):
            raise _indivisible(model, group, f"{path}.{name} is {size}")


def _kind(model: Module) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))


def _indivisible(model: Module, group: Group, why: str) -> NoPlan:
    return NoPlan(f"{group.size()} Macs cannot share the layers of this {_kind(model)} model: {why}")


def _dimensions(model: Module) -> dict[tuple[str, str], tuple[Module, int]]:
    """Return the whole numbers among the attributes of all modules (numbers of heads, widths), by path and name."""
    return {
        (path, name): (module, value)
        for path, module in named_modules(model)
        for name, value in vars(module).items()
        if type(value) is int
    }


def _divides(before: int, after: Any, size: int) -> bool:
    """Return whether a dimension was left alone or divided without a remainder.

    mlx-lm divides most of them with ``//``, without a check. Where there are fewer heads for keys than ranks, some
    models (qwen3_5) repeat them, so that each rank has one.
    """
    return after in (before, before / size) or (after == 1 and size % before == 0)


@contextmanager
def _all_lazy() -> Iterator[None]:
    """Keep, inside the block, models from evaluating or copying what they cut (muse_spark's experts)."""
    module: Any = mx
    original = mx.eval, mx.contiguous
    module.eval, module.contiguous = _ignore, _same
    try:
        yield
    finally:
        module.eval, module.contiguous = original


def _ignore(*_arrays: Any) -> None:
    """Stand in for ``mx.eval``."""


def _same(array: mx.array, *_args: Any, **_kwargs: Any) -> mx.array:
    """Stand in for ``mx.contiguous``: arrays are copied when they are read."""
    return array
