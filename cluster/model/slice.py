"""A run of a model's layers that answers to the model's own forward: no architecture is written again.

Layers before the slice become ghosts: the same objects with the same attributes, without their arrays, whose call
returns what came from the stage before. The slice's last layer raises its value out of the forward, so that the
layers after it, the norm and the head never run. Embedding and masks are built by the model's code and, MLX being
lazy, never computed where a ghost throws them away.

It knows layers and arrays; it knows nothing of frames, sequences' ids or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from cluster.core.errors import NoPlan
from cluster.core.plan import LayerRange
from cluster.model.cache_abilities import batchable
from cluster.model.caches import CacheLayout, HeldCaches, SequenceCaches
from cluster.model.kv_quantization import choose_quantization
from cluster.model.module_tree import Module, module_arrays, named_modules
from cluster.model.pytree import put_together, take_apart
from cluster.model.symbolic_run import replace_call
from cluster.model.trace import Boundary, Trace

__all__ = ["ModelSlice"]


class _Outlet(Exception):
    """No error: it carries the value out of the model's forward."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class ModelSlice:
    """Layers ``layers`` of ``model``, which becomes this slice's own and is changed for good.

    ``inlet`` and ``outlet`` describe what crosses the cuts on either side; None where the model begins or ends.
    ``batchable`` says whether ``run`` takes the caches of a batch. ``kv_bits`` 4 or 8 quantizes its caches, 0 does not.
    Raises NoPlan when a cut is not clean or the model has no such layers, and what
    ``choose_quantization`` raises.
    """

    def __init__(self, model: Module, traced: Trace, layers: LayerRange, kv_bits: int = 0) -> None:
        _require_clean(traced, layers)
        self.layers = layers
        self.inlet = traced.boundaries[layers.start] if layers.start > 0 else None
        self.outlet = traced.boundaries[layers.end] if layers.end < traced.layers else None
        quantization = choose_quantization(model, kv_bits)
        self.batchable = quantization is None and batchable(model, traced)
        self._model = model
        self._outside = {name for name, readers in traced.shared.items() if _any_in(readers, layers)}
        self._layout = CacheLayout.of(model, traced, layers, quantization)
        self._incoming: Any = None
        self._drop_other_arrays()
        self._replace_calls()

    def layer_arrays(self, layer: int) -> list[mx.array]:
        """Every array that one local layer owns."""
        return [array for _, module in named_modules(self._model.layers[layer]) for array in module_arrays(module)]

    def outside_arrays(self) -> list[mx.array]:
        """Every array outside the local layers that this slice reads: embedding, norm, head."""
        return [array for name, m in named_modules(self._model) if name in self._outside for array in module_arrays(m)]

    def new_caches(self) -> SequenceCaches:
        return SequenceCaches.new(self._model, self._layout)

    def run(self, tokens: mx.array, caches: HeldCaches, incoming: Sequence[mx.array] = ()) -> list[mx.array]:
        """Build the forward of one step, and set the device to work on its beginning; nothing is waited for.

        ``tokens`` has shape [batch, length]; ``incoming`` are the inlet's arrays. -> the outlet's arrays, or the
        logits [batch, length, vocabulary] alone on the last slice.
        """
        if self.inlet is not None:
            self._incoming = _put_together(self.inlet, incoming)
        try:
            outgoing = [_logits(self._model(tokens, cache=caches.view()))]
        except _Outlet as out:
            arrays = take_apart(out.value)[1]
            outgoing = [arrays[i] for i in self.outlet.kept] if self.outlet else []
        finally:
            self._incoming = None
        caches.follow(*tokens.shape)
        return outgoing

    def _drop_other_arrays(self) -> None:
        """Remove the arrays of the other layers, but for modules that this slice reads too or shares with them."""
        layers = list(self._model.layers)
        local = layers[self.layers.start : self.layers.end]
        kept = {id(module) for layer in local for _, module in named_modules(layer)}
        kept |= {id(module) for name, module in named_modules(self._model) if name in self._outside}
        others = layers[: self.layers.start] + layers[self.layers.end :]
        for module in (module for layer in others for _, module in named_modules(layer) if id(module) not in kept):
            for key in [key for key, value in module.items() if isinstance(value, mx.array)]:
                del module[key]

    def _replace_calls(self) -> None:
        started = _starts(self.layers)
        for i, layer in enumerate(self._model.layers):
            if i < self.layers.start:
                replace_call(layer, self._ghost)
            elif i >= self.layers.end:
                replace_call(layer, _never)
            elif i in started:
                replace_call(layer, _start_device_after(type(layer).__call__))
        if self.outlet is not None:
            last = self._model.layers[self.layers.end - 1]
            own = type(last).__call__
            replace_call(last, lambda *args, **kwargs: _raise_out(own(*args, **kwargs)))

    def _ghost(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._incoming


def _starts(layers: LayerRange) -> frozenset[int]:
    """After which layers the device is set to work on what has been built so far, while Python builds the rest.

    The first, since until then the device waits, and then ever more at a time: a start costs tens of microseconds, and
    building is faster than computing. The last layer is evaluated with the step.
    """
    count = layers.end - layers.start
    return frozenset(layers.start + 2**i - 1 for i in range(count.bit_length()) if 2**i < count)


def _start_device_after(own: Any) -> Any:
    """A layer's call, which sets the device to work on what it returns."""

    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        value = own(self, *args, **kwargs)
        mx.async_eval(take_apart(value)[1])  # type: ignore[no-untyped-call]
        return value

    return call


def _never(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("a layer after the slice was called")


def _raise_out(value: Any) -> None:
    raise _Outlet(value)


def _put_together(inlet: Boundary, incoming: Sequence[mx.array]) -> Any:
    """The value that a ghost returns: the arrays that crossed the cut, put where the template has its holes."""
    arrays: list[mx.array | None] = [None] * inlet.holes
    for hole, array in zip(inlet.kept, incoming, strict=True):
        arrays[hole] = array
    return put_together(inlet.template, arrays)


def _logits(out: Any) -> mx.array:
    logits: mx.array = out[0] if isinstance(out, tuple) else out
    return logits


def _any_in(readers: frozenset[int], layers: LayerRange) -> bool:
    return any(layers.start <= layer < layers.end for layer in readers)


def _require_clean(traced: Trace, layers: LayerRange) -> None:
    if layers.end > traced.layers:
        raise NoPlan(f"layers {layers} were asked for, but the model has only {traced.layers}")
    for cut in (layers.start, layers.end):
        if cut in traced.unclean:
            raise NoPlan(f"the model cannot be cut before layer {cut}: {traced.unclean[cut]}")
