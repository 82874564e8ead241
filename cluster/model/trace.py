"""What a symbolic run tells about a model: where it may be cut, what crosses a cut, and who needs what.

No weight is read and nothing is evaluated. The run is made at two lengths, since some flows exist only once a block
of tokens is full (compressed groups, chunked attention, sparse indexers). It knows nothing of workers or plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import mlx.core as mx

from cluster.core.errors import MacpipeError, ModelUnsupported
from cluster.model.lazy_graph import LazyGraph
from cluster.model.module_tree import Module, layer_prefixes, parameters, stand_ins, tree_arrays
from cluster.model.symbolic_run import Recording, record

__all__ = ["LENGTHS", "Boundary", "Leaf", "Trace", "trace"]

LENGTHS: Final = (3, 129)
"""Tokens of the two runs: fewer than any block, and one more than a block of 128."""
WARM: Final = 5
"""Context of the run that shows whether a boundary value grows with it; any small number will do."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array that crosses a cut.

    ``dims`` has its sizes for one sequence: a number, "batch" (sequences), "length" (tokens of the step), or None
    where it depends on the length in another way. ``dtype`` is MLX's.
    """

    dtype: mx.Dtype
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses a cut: the layer's return value, of which only the arrays numbered ``kept`` are sent."""

    template: Any
    holes: int
    kept: tuple[int, ...]
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A model's map. ``cut`` e lies before layer e; ``unclean`` gives a reason for each cut that must not be used.

    ``layer_caches`` has the indices of mlx-lm's caches that each layer is called with; ``caches`` is how many there
    are, ``idle`` those that stay empty (a layer without attention may be called with one). ``shared`` maps the path of
    each module outside the layers to the layers whose stage reads its weights.
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
        return len(self.prefixes)

    @property
    def clean(self) -> tuple[int, ...]:
        return tuple(cut for cut in range(1, self.layers) if cut not in self.unclean)


def trace(model: Module) -> Trace:
    """Trace ``model``, whose parameters are stand-ins while it runs and are put back afterwards.

    Raises ModelUnsupported when the model does not call each of its layers once, in order, or cannot run here at all.
    """
    try:
        studies = [_study(model, length) for length in LENGTHS]
        with stand_ins(model):
            pair = record(model, LENGTHS[0], rows=2)
    except MacpipeError:
        raise
    except Exception as error:  # model code raises whatever this device makes it raise (a kernel that only Macs have)
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
    """Each has stand-ins of its own: some models (gemma3n) put what they computed in a weight's place as they run."""
    with stand_ins(model):
        return _Study(model, length)


class _Study:
    """One run of one length, with its graph, and the questions that are put to it."""

    def __init__(self, model: Module, length: int) -> None:
        weights = parameters(model)  # taken before the run: some models assign parameters in their forward
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
        """What the layers from ``cut`` on and the logits depend on, not looking past the value at the cut."""
        return self._graph.ancestors([self.run.logits, *self._states[cut:]], stop=self.value(cut))

    def value(self, cut: int) -> list[mx.array]:
        """The arrays in the return value of the layer before the cut."""
        return self.run.calls[cut - 1].arrays

    def kept(self, cut: int) -> list[int]:
        """Which of them anything after the cut depends on; all, where the graph does not say."""
        nodes = self._graph.nodes(self.value(cut))
        return [i for i, node in enumerate(nodes) if node in self._after[cut]] or list(range(len(nodes)))

    def unclean(self) -> dict[int, str]:
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
        """Paths of the modules outside the layers whose weights a stage with layers start .. end - 1 reads."""
        if self._opaque:
            return {_module(path) for path, owner in self._owner.items() if owner is None}
        last = end == len(self.prefixes)
        results = [self.run.logits] if last else [self.value(end)[i] for i in kept]
        results += self._states[start:end]
        nodes = self._graph.ancestors(results, stop=self.value(start) if start else ())
        paths = self._graph.parameters_in(nodes)
        return {_module(path) for path in paths if self._owner[path] not in range(start, end)}

    def _loses_layers(self) -> bool:
        """A forward that evaluates on its way (dbrx: ``inds.tolist()``) cuts the graph: early layers drop out."""
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
    """One array that depends on everything in a layer's caches: a graph can name about a thousand arrays, no more."""
    sums = [mx.sum(array).astype(mx.float32) for array in tree_arrays(states)]
    return mx.stack(sums) if sums else mx.zeros(())


def _owner(path: str, prefixes: tuple[str, ...]) -> int | None:
    """The layer that a parameter belongs to."""
    return next((i for i, p in enumerate(prefixes) if path.startswith(p + ".") or path == p), None)


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def _boundary(cut: int, kept: tuple[int, ...], runs: list[Recording]) -> Boundary:
    """``runs`` are the short one, the long one, and the short one of two sequences."""
    calls = [run.calls[cut - 1] for run in runs]
    crossing = [[call.arrays[i] for call in calls] for i in kept]
    return Boundary(calls[0].template, len(calls[0].arrays), kept, tuple(_leaf(*arrays) for arrays in crossing))


def _leaf(short: mx.array, long: mx.array, pair: mx.array) -> Leaf:
    """Read off the three runs which dims follow the length and which the number of sequences."""
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
    """Module path -> a layer of every segment between clean cuts that reads it: its first layer, or the last one's end.

    A stage is a row of whole segments, and what it reads is what its segments read.
    """
    readers: dict[str, set[int]] = {}
    for start, end in pairwise(clean):
        names = set[str]().union(*(study.outside(start, end, kept.get(end, [])) for study in studies))
        for name in names:
            readers.setdefault(name, set()).add(start if start == 0 else end - 1)
    return {name: frozenset(layers) for name, layers in sorted(readers.items())}
