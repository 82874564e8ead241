"""Runs a range of a model's layers through the model's own forward, so that no architecture is reimplemented.

Layers before the slice become ghosts: the same objects with the same attributes but without arrays. A call of a ghost
returns the value from the previous stage. The slice's last layer raises its value out of the forward as an exception,
so later layers, the norm and the head never run. The model's code still builds embedding and masks; MLX is lazy, so
they are not computed if a ghost discards them.

It knows layers and arrays, nothing of frames, sequence ids or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from cluster.core.errors import NoPlan
from cluster.core.plan import LayerRange
from cluster.model.adapters import LoraLayers, load_adapter
from cluster.model.cache_abilities import batchable
from cluster.model.caches import CacheLayout, HeldCaches, SequenceCaches
from cluster.model.kv_quantization import choose_quantization
from cluster.model.module_tree import Module, module_arrays, named_modules
from cluster.model.pytree import flatten, unflatten
from cluster.model.symbolic_run import replace_call
from cluster.model.trace import Boundary, Trace

__all__ = ["ModelSlice"]


class _Outlet(Exception):
    """Carries the value out of the model's forward. Not an error."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class ModelSlice:
    """Layers ``layers`` of ``model``. The slice takes ownership of ``model`` and modifies it permanently.

    ``inlet`` and ``outlet`` describe the values that cross the cuts before and after it; None at the model's start or
    end. ``batchable``: ``run`` accepts the caches of a batch. ``kv_bits`` is 4 or 8 to quantize its caches, else 0.
    ``early_start``: let the device start before the whole graph is built, which a graph transformation forbids. Raises
    NoPlan if a cut is not clean or the model has no such layers, and the errors of ``choose_quantization``.
    """

    def __init__(
        self, model: Module, traced: Trace, layers: LayerRange, kv_bits: int = 0, *, early_start: bool = True
    ) -> None:
        _require_clean(traced, layers)
        self.layers = layers
        self.inlet = traced.boundaries[layers.start] if layers.start > 0 else None
        self.outlet = traced.boundaries[layers.end] if layers.end < traced.layers else None
        quantization = choose_quantization(model, kv_bits)
        self.batchable = quantization is None and batchable(model, traced)
        self._model = model
        self._adapter: LoraLayers | None = None
        self._traced = traced
        self._outside = traced.outside(layers)
        self._layout = CacheLayout.of(model, traced, layers, quantization)
        self._incoming: Any = None
        self._keeps_state = False
        self._state: mx.array | None = None
        self._drop_other_arrays()
        self._replace_calls(_start_points(layers) if early_start else frozenset())

    def layer_arrays(self, layer: int) -> list[mx.array]:
        """Return all arrays of one local layer."""
        return [array for _, module in named_modules(self._model.layers[layer]) for array in module_arrays(module)]

    def outside_arrays(self) -> list[mx.array]:
        """Return the arrays outside the local layers that this slice reads: embedding, norm, head."""
        return [array for name, m in named_modules(self._model) if name in self._outside for array in module_arrays(m)]

    def set_arrays(self, arrays: Iterable[tuple[str, mx.array]]) -> None:
        """Replace arrays, given with their paths, by others of the same shapes and types."""
        modules = dict(named_modules(self._model))
        for path, array in arrays:
            module, _, key = path.rpartition(".")
            modules[module][key] = array

    def load_adapter(self, folder: Path, fingerprint: str) -> LoraLayers:
        """Load the part of an adapter that is for this slice. Raises as ``adapters.load_adapter``."""
        self.use_adapter(None)
        return load_adapter(self._model, folder, fingerprint, self._is_local)

    def use_adapter(self, adapter: LoraLayers | None) -> None:
        """Run with ``adapter`` from now on; with None, without one. Costs nothing if it is used already."""
        if adapter is self._adapter:
            return
        if self._adapter:
            self._adapter.remove()
        if adapter:
            adapter.apply()
        self._adapter = adapter

    def _is_local(self, path: str) -> bool:
        return self._traced.is_local(path, self.layers)

    def new_caches(self) -> SequenceCaches:
        """Create empty caches for one sequence."""
        return SequenceCaches.new(self._model, self._layout)

    def run(self, tokens: mx.array, caches: HeldCaches, incoming: Sequence[mx.array] = ()) -> list[mx.array]:
        """Build the forward of one step and start the device on its first part, without waiting.

        ``tokens`` has shape [batch, length]; ``incoming`` are the inlet's arrays. Return the outlet's arrays; on the
        last slice, only the logits [batch, length, vocabulary].
        """
        outgoing = self._run(incoming, lambda: self._model(tokens, cache=caches.view()))
        caches.follow(*tokens.shape)
        return outgoing

    def run_with_state(
        self, tokens: mx.array, caches: HeldCaches, incoming: Sequence[mx.array] = ()
    ) -> tuple[list[mx.array], mx.array | None]:
        """Run the last slice as ``run``. Return also the hidden states [batch, length, width] that the head is given.

        They are None if the model has no module of its own around its layers, from which they come.
        """
        self._keeps_state = True
        try:
            return self.run(tokens, caches, incoming), self._state
        finally:
            self._keeps_state, self._state = False, None

    def run_without_caches(self, tokens: mx.array, incoming: Sequence[mx.array] = ()) -> list[mx.array]:
        """Build the forward of whole sequences, as in training. Arguments and result are those of ``run``."""
        return self._run(incoming, lambda: self._model(tokens))

    def _run(self, incoming: Sequence[mx.array], forward: Callable[[], Any]) -> list[mx.array]:
        if self.inlet is not None:
            self._incoming = _rebuild_input(self.inlet, incoming)
        try:
            return [_logits(forward())]
        except _Outlet as out:
            arrays = flatten(out.value)[1]
            return [arrays[i] for i in self.outlet.kept] if self.outlet else []
        finally:
            self._incoming = None

    def _drop_other_arrays(self) -> None:
        """Remove the arrays of the other layers, except those of modules that this slice also uses."""
        layers = list(self._model.layers)
        local = layers[self.layers.start : self.layers.end]
        kept = {id(module) for layer in local for _, module in named_modules(layer)}
        kept |= {id(module) for name, module in named_modules(self._model) if name in self._outside}
        others = layers[: self.layers.start] + layers[self.layers.end :]
        for module in (module for layer in others for _, module in named_modules(layer) if id(module) not in kept):
            for key in [key for key, value in module.items() if isinstance(value, mx.array)]:
                del module[key]

    def _replace_calls(self, start_points: frozenset[int]) -> None:
        for i, layer in enumerate(self._model.layers):
            if i < self.layers.start:
                replace_call(layer, self._ghost)
            elif i >= self.layers.end:
                replace_call(layer, _never)
            elif i in start_points:
                replace_call(layer, _start_device_after(type(layer).__call__))
        if self.outlet is None and (body := self._body()) is not None:
            own_body = type(body).__call__
            replace_call(body, lambda *args, **kwargs: self._keep_state(own_body(*args, **kwargs)))
        if self.outlet is not None:
            last = self._model.layers[self.layers.end - 1]
            own = type(last).__call__
            replace_call(last, lambda *args, **kwargs: _raise_out(own(*args, **kwargs)))

    def _body(self) -> Module | None:
        """Return the module that holds the layers and the norm after them; None if the model itself does."""
        path = self._traced.prefixes[self.layers.end - 1].rpartition(".")[0].rpartition(".")[0]
        return dict(named_modules(self._model)).get(path) if path else None

    def _keep_state(self, value: Any) -> Any:
        if self._keeps_state:
            self._state = _logits(value)
        return value

    def _ghost(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._incoming


def _start_points(layers: LayerRange) -> frozenset[int]:
    """Return the layers after which the device starts on the graph built so far, while Python builds the rest.

    The first start follows the first layer, since the device is idle until then. The distance then doubles: a start
    costs tens of microseconds, and building is faster than computing. The last layer is evaluated with the step.
    """
    count = layers.end - layers.start
    return frozenset(layers.start + 2**i - 1 for i in range(count.bit_length()) if 2**i < count)


def _start_device_after(own: Any) -> Any:
    """Wrap a layer's call so that the device starts to compute its return value."""

    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        value = own(self, *args, **kwargs)
        mx.async_eval(flatten(value)[1])  # type: ignore[no-untyped-call]
        return value

    return call


def _never(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("a layer after the slice was called")


def _raise_out(value: Any) -> None:
    raise _Outlet(value)


def _rebuild_input(inlet: Boundary, incoming: Sequence[mx.array]) -> Any:
    """Return the value of a ghost: the template with the arrays that crossed the cut."""
    arrays: list[mx.array | None] = [None] * inlet.array_count
    for placeholder, array in zip(inlet.kept, incoming, strict=True):
        arrays[placeholder] = array
    return unflatten(inlet.template, arrays)


def _logits(out: Any) -> mx.array:
    logits: mx.array = out[0] if isinstance(out, tuple) else out
    return logits


def _require_clean(traced: Trace, layers: LayerRange) -> None:
    if layers.end > traced.layers:
        raise NoPlan(f"invalid layers {layers}: the model has only {traced.layers} layers")
    for cut in (layers.start, layers.end):
        if cut in traced.unclean:
            raise NoPlan(f"the model cannot be cut before layer {cut}: {traced.unclean[cut]}")
