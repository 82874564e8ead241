"""Analyses a model with symbolic runs: where it may be cut, what crosses a cut, and which layers read which weights.

It reads no weights and evaluates nothing. It uses two lengths, since some data flows exist only after a block of tokens
is full (compressed groups, chunked attention, sparse indexers). It knows nothing of workers or plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import mlx.core as mx

from cluster.core.errors import MacpipeError, ModelUnsupported
from cluster.core.plan import LayerRange
from cluster.model.lazy_graph import LazyGraph
from cluster.model.module_tree import Module, layer_prefixes, parameters, tree_arrays, zero_parameters
from cluster.model.symbolic_run import Recording, record

__all__ = ["LENGTHS", "Boundary", "Leaf", "Trace", "trace"]

LENGTHS: Final = (3, 129)
"""Tokens of the two runs: fewer than any block, and one more than a block of 128."""
WARM: Final = 5
"""Tokens of context in the run that shows whether a boundary value grows with it; any small number works."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array that crosses a cut.

    ``dims`` has its dimensions: a number, "batch" (sequences), "length" (tokens of the step), or None if the size
    depends on the length in another way. ``dtype`` is MLX's.
    """

    dtype: mx.Dtype
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Boundary:
    """The value that crosses a cut: a layer's return value. Only the arrays with the indices ``kept`` are sent.

    ``template`` has a placeholder for each of ``array_count`` arrays; ``leaves`` describe the kept ones, in order.
    """

    template: Any
    array_count: int
    kept: tuple[int, ...]
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The analysis of a model. Cut e is before layer e; ``unclean`` maps each cut that must not be used to a reason.

    ``prefixes`` are the layers' module paths. ``layer_caches`` has, for each layer, the indices of the mlx-lm caches
    that it is called with. ``caches`` is their number. ``idle`` are those that stay empty (a layer without attention
    may be called with one). ``shared`` maps the path of each module outside the layers to layers: a stage with one of
    them reads the module's weights.
    """

    vocabulary: int
    prefixes: tuple[str, ...]
    caches: int
    layer_caches: tuple[frozenset[int], ...]
    idle: frozenset[int]
    unclean: Mapping[int, str]
    boundaries: Mapping[int, Boundary]
    shared: Mapping[str, frozenset[int]]

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return len(self.prefixes)

    @property
    def clean(self) -> tuple[int, ...]:
        """Return the cuts that may be used."""
        return tuple(cut for cut in range(1, self.layers) if cut not in self.unclean)

    def outside(self, layers: LayerRange) -> frozenset[str]:
        """Return the paths of the modules outside the layers whose weights a stage with ``layers`` reads."""
        return frozenset(
            name for name, readers in self.shared.items() if any(i in readers for i in range(layers.start, layers.end))
        )

    def is_local(self, path: str, layers: LayerRange) -> bool:
        """Return whether a stage with ``layers`` reads the weights of the module at ``path``."""
        own = self.prefixes[layers.start : layers.end]
        return path in self.outside(layers) or any(path == prefix or path.startswith(f"{prefix}.") for prefix in own)


def trace(model: Module) -> Trace:
    """Trace ``model``. Its parameters are replaced by stand-ins during the runs and restored afterwards.

    Raises ModelUnsupported if the model does not call each of its layers once, in order, or cannot run on this machine.
    """
    try:
        studies = [_study(model, length) for length in LENGTHS]
        with zero_parameters(model):
            pair = record(model, LENGTHS[0], rows=2)
    except MacpipeError:
        raise
    except Exception as error:  # model code may raise anything on an unsupported device (a kernel for Macs only)
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelUnsupported(f"{_kind(model)} models cannot run on this machine: {why}") from error
    unclean = {cut: why for study in reversed(studies) for cut, why in study.unclean().items()}
    kept = {cut: sorted(set().union(*(s.kept(cut) for s in studies))) for cut in studies[0].cuts}
    boundaries = {cut: _boundary(cut, tuple(kept[cut]), [*(s.run for s in studies), pair]) for cut in kept}
    clean = [0, *(cut for cut in studies[0].cuts if cut not in unclean), len(model.layers)]
    return Trace(
        vocabulary=studies[0].run.logits.shape[-1],
        prefixes=studies[0].prefixes,
        caches=len(studies[0].run.caches),
        layer_caches=tuple(call.caches for call in studies[0].run.calls),
        idle=frozenset(i for i, cache in enumerate(studies[-1].run.caches) if not tree_arrays(cache.state)),
        unclean=unclean,
        boundaries=boundaries,
        shared=_shared_modules(clean, kept, studies),
    )


def _study(model: Module, length: int) -> _Study:
    """Run one study with new stand-ins, since some models (gemma3n) overwrite weights with computed values."""
    with zero_parameters(model):
        return _Study(model, length)


class _Study:
    """One run of one length and its graph, with methods that analyse the graph."""

    def __init__(self, model: Module, length: int) -> None:
        weights = parameters(model)  # read before the run: some models assign parameters in their forward
        self.run = record(model, length)
        self.prefixes = layer_prefixes(model)
        _require_order(self.run, self.prefixes, model)
        self.warm = record(model, length, WARM)
        self.cuts = range(1, len(self.prefixes))
        self._states = [_join_arrays([self.run.caches[i].state for i in call.caches]) for call in self.run.calls]
        values = [array for call in self.run.calls for array in call.arrays]
        self._graph = LazyGraph(weights, [self.run.logits, *values, *self._states])
        self._owner = {path: _owner(path, self.prefixes) for path in weights}
        self._after = {cut: self._ancestors_after(cut) for cut in self.cuts}
        self._opaque = self._loses_layers()

    def _ancestors_after(self, cut: int) -> set[str]:
        """Return the nodes that layers from ``cut`` on and the logits depend on; the search ends at the cut's value."""
        return self._graph.ancestors([self.run.logits, *self._states[cut:]], stop=self.value(cut))

    def value(self, cut: int) -> list[mx.array]:
        """Return the arrays in the return value of the layer before the cut."""
        return self.run.calls[cut - 1].arrays

    def kept(self, cut: int) -> list[int]:
        """Return the indices of the arrays in ``value(cut)`` that later nodes depend on; all if there are none."""
        nodes = self._graph.nodes(self.value(cut))
        return [i for i, node in enumerate(nodes) if node in self._after[cut]] or list(range(len(nodes)))

    def unclean(self) -> dict[int, str]:
        """Return the cuts that must not be used, each with the reason."""
        reasons = {cut: self._leak(cut) or self._growth(cut) for cut in self.cuts}
        return {cut: why for cut, why in reasons.items() if why}

    def _leak(self, cut: int) -> str:
        owners = {self._owner[path] for path in self._graph.parameters_in(self._after[cut])}
        early = sorted(owner for owner in owners if owner is not None and owner < cut)
        return f"layers {early} feed later layers past the value that layer {cut - 1} returns" if early else ""

    def _growth(self, cut: int) -> str:
        warm = self.warm.calls[cut - 1].arrays
        grown = [i for i in self.kept(cut) if self.value(cut)[i].shape != warm[i].shape]
        return f"the value that layer {cut - 1} returns grows with the context" if grown else ""

    def outside(self, start: int, end: int, kept: list[int]) -> set[str]:
        """Return the paths of modules outside the layers whose weights a stage with layers start .. end - 1 reads."""
        if self._opaque:
            return {_module(path) for path, owner in self._owner.items() if owner is None}
        last = end == len(self.prefixes)
        results = [self.run.logits] if last else [self.value(end)[i] for i in kept]
        results += self._states[start:end]
        nodes = self._graph.ancestors(results, stop=self.value(start) if start else ())
        paths = self._graph.parameters_in(nodes)
        return {_module(path) for path in paths if self._owner[path] not in range(start, end)}

    def _loses_layers(self) -> bool:
        """Return whether the graph lacks layers: a forward that evaluates values (dbrx: ``inds.tolist()``) cuts it."""
        seen = {self._owner[path] for path in self._graph.parameters_in(self._graph.ancestors([self.run.logits]))}
        return any(owner not in seen for owner in self._owner.values() if owner is not None)


def _require_order(run: Recording, prefixes: tuple[str, ...], model: Module) -> None:
    if [call.layer for call in run.calls] != list(range(len(prefixes))):
        raise ModelUnsupported(
            f"{_kind(model)} models cannot be cut into stages: they do not call each of their {len(prefixes)} layers "
            f"once, in order, but make {len(run.calls)} layer calls (a looped model)"
        )


def _kind(model: Module) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))


def _join_arrays(states: list[Any]) -> mx.array:
    """Return one array that depends on all arrays in ``states``: a graph can name only about a thousand arrays."""
    sums = [mx.sum(array).astype(mx.float32) for array in tree_arrays(states)]
    return mx.stack(sums) if sums else mx.zeros(())


def _owner(path: str, prefixes: tuple[str, ...]) -> int | None:
    """Return the layer that a parameter belongs to; None if it is outside the layers."""
    return next((i for i, p in enumerate(prefixes) if path.startswith(p + ".") or path == p), None)


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def _boundary(cut: int, kept: tuple[int, ...], runs: list[Recording]) -> Boundary:
    """Describe the value at ``cut``. ``runs`` are the short run, the long run, and the short run of two sequences."""
    calls = [run.calls[cut - 1] for run in runs]
    crossing = [[call.arrays[i] for call in calls] for i in kept]
    return Boundary(calls[0].template, len(calls[0].arrays), kept, tuple(_leaf(*arrays) for arrays in crossing))


def _leaf(short: mx.array, long: mx.array, pair: mx.array) -> Leaf:
    """Compare the three runs to find which dimensions depend on the length and which on the number of sequences."""
    dims: list[int | str | None] = []
    for one, grown, two in zip(short.shape, long.shape, pair.shape, strict=True):
        if (one, grown, two) == (*LENGTHS, LENGTHS[0]):
            dims.append("length")
        elif (one, grown, two) == (1, 1, 2):
            dims.append("batch")
        else:
            dims.append(one if one == grown == two else None)
    return Leaf(short.dtype, tuple(dims))


def _shared_modules(
    clean: list[int], kept: Mapping[int, list[int]], studies: list[_Study]
) -> dict[str, frozenset[int]]:
    """Map each shared module's path to one layer of every segment between clean cuts that reads it.

    That layer is layer 0 for the first segment and the segment's last layer otherwise. A stage consists of whole
    segments, so it reads exactly what its segments read.
    """
    readers: dict[str, set[int]] = {}
    for start, end in pairwise(clean):
        names = set[str]().union(*(study.outside(start, end, kept.get(end, [])) for study in studies))
        for name in names:
            readers.setdefault(name, set()).add(start if start == 0 else end - 1)
    return {name: frozenset(layers) for name, layers in sorted(readers.items())}
