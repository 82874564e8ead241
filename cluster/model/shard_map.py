"""Finds which ranges of which file tensors the rank of a group holds, so that it reads no others.

Two questions are asked of mlx-lm's own code. Which parameter of the whole model is which file tensor, or a stack of
which? The arrays of the files are recognised as they pass through it. Which part of a parameter does a rank keep? The
parameters are replaced by stand-ins that hold positions along one axis, once for each axis, the model is sharded, and
the positions are read off. A parameter that is no selection of one of these (dequantized, transposed, divided) is not
in the map: it has to be read whole and cut afterwards.

It reads headers but no tensors. It knows positions, nothing of bytes or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from cluster.model.module_tree import Module, parameters, replace_parameters
from cluster.model.safetensors import TensorInfo
from cluster.model.sharding import Seat, shard_model

__all__ = ["Run", "TensorPart", "TensorSource", "map_parts", "record_sources"]

Run = tuple[int, int]
"""The positions ``start .. end - 1`` along an axis."""

_FACTOR: Final = 2_654_435_761
"""Odd, so that multiples of it are distinct below ``_MODULUS``: a position's code betrays arithmetic done with it."""
_MODULUS: Final = 2**24
"""float32 has all whole numbers below it, and no axis is as long."""
_INVERSE: Final = pow(_FACTOR, -1, _MODULUS)
_CHECKED: Final = 48
"""Random elements of each part that are compared with what its axes say."""


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The tensors of a parameter: one that is the parameter, or several that are stacked along a new first axis."""

    tensors: tuple[TensorInfo, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.tensors[0].shape
        return (len(self.tensors), *own) if self.stacked else own


@dataclass(frozen=True, slots=True)
class TensorPart:
    """What a rank keeps of a parameter: for each axis of the source, the runs of positions in their order."""

    source: TensorSource
    axes: tuple[tuple[Run, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(end - start for start, end in runs) for runs in self.axes)


@contextmanager
def record_sources(tensors: Mapping[str, TensorInfo]) -> Iterator[Callable[[Module], dict[str, TensorSource]]]:
    """Note, inside the block, which arrays come from files. Yield a function that finds them in a model by path.

    ``tensors`` are those of the checkpoint that the block opens. The function keeps all arrays alive: drop it before
    they are evaluated.
    """
    # It keeps the arrays, since the id of a freed one is used again.
    known: dict[int, tuple[mx.array, TensorSource]] = {}
    module: Any = mx
    load, stack = mx.load, mx.stack

    def load_and_note(file: Any, *args: Any, **kwargs: Any) -> Any:
        arrays: Any = load(file, *args, **kwargs)
        for name, array in arrays.items():
            info = tensors.get(name)
            if info and info.file == Path(file).name and _is_plain(info, array):
                known[id(array)] = array, TensorSource((info,))
        return arrays

    def stack_and_note(arrays: list[mx.array], *args: Any, **kwargs: Any) -> mx.array:
        stacked: mx.array = stack(arrays, *args, **kwargs)
        found = [known[id(array)][1] for array in arrays if id(array) in known]
        axis = kwargs.get("axis", args[0] if args else 0)
        if axis == 0 and len(found) == len(arrays) and not any(source.stacked for source in found):
            known[id(stacked)] = stacked, TensorSource(tuple(source.tensors[0] for source in found), stacked=True)
        return stacked

    module.load, module.stack = load_and_note, stack_and_note
    try:
        yield lambda model: {
            path: known[id(array)][1] for path, array in parameters(model).items() if id(array) in known
        }
    finally:
        module.load, module.stack = load, stack


def _is_plain(info: TensorInfo, array: mx.array) -> bool:
    """Return whether MLX's array has the bytes of the file's tensor, element by element."""
    return tuple(array.shape) == info.shape and array.nbytes == info.nbytes


def map_parts(
    model: Module, sources: Mapping[str, TensorSource], seat: Seat, is_wanted: Callable[[str], bool]
) -> dict[str, TensorPart]:
    """Return, by path, what ``seat`` keeps of those wanted parameters that sharding cuts.

    ``model`` is whole, before and after. What is missing is either whole or no selection of its source. Raises as
    ``shard_model``.
    """
    found: dict[str, TensorPart] | None = None
    for axis in range(max((len(source.shape) for source in sources.values()), default=0)):
        runs = _runs_along(model, sources, seat, axis, is_wanted)
        if found is None:
            found = {path: TensorPart(sources[path], ()) for path in runs}
        found = {
            path: replace(part, axes=(*part.axes, runs[path])) if axis < len(part.source.shape) else part
            for path, part in found.items()
            if path in runs
        }
    return found or {}


def _runs_along(
    model: Module, sources: Mapping[str, TensorSource], seat: Seat, axis: int, is_wanted: Callable[[str], bool]
) -> dict[str, tuple[Run, ...]]:
    """Return the runs along ``axis`` of each wanted parameter that sharding cuts, and that is a selection along it."""
    with replace_parameters(model, lambda whole: _positions(whole.shape, axis)):
        before = parameters(model)
        shard_model(model, seat)
        after = parameters(model)
        cut = {path: after[path] for path in sources if is_wanted(path) and after.get(path) is not before.get(path)}
        lines = {path: _AxisSample.of(part, axis) for path, part in cut.items() if _is_alike(part, before[path])}
        mx.eval([(line.through_origin, line.elsewhere) for line in lines.values()])  # all at once, which is faster
        found = {path: line.read_runs(before[path].shape) for path, line in lines.items()}
    return {path: runs for path, runs in found.items() if runs is not None}


def _is_alike(part: mx.array, whole: mx.array) -> bool:
    return part.ndim == whole.ndim and part.dtype == whole.dtype and part.size > 0


def _positions(shape: Sequence[int], axis: int) -> mx.array:
    """Return an array of the codes of positions along ``axis``; without that axis, all of one code."""
    length = shape[axis] if axis < len(shape) else 1
    line = [length if i == axis else 1 for i in range(len(shape))]
    codes = np.arange(1, length + 1, dtype=np.uint64) * _FACTOR % _MODULUS
    return mx.broadcast_to(mx.array(codes.astype(np.float32)).reshape(line), shape)


@dataclass(frozen=True, slots=True)
class _AxisSample:
    """Elements of a part of positions: all ``through_origin`` along an axis, and some ``elsewhere`` at random places.

    ``places`` are the latter's indices along the axis.
    """

    axis: int
    through_origin: mx.array
    elsewhere: mx.array
    places: NDArray[np.int64]

    @staticmethod
    def of(part: mx.array, axis: int) -> _AxisSample:
        """Choose the elements. A part without that axis has a line of one element."""
        random = np.random.default_rng(axis)
        places = [random.integers(0, size, _CHECKED) for size in part.shape]
        line = part[tuple(slice(None) if i == axis else 0 for i in range(part.ndim))]
        elsewhere = part[tuple(mx.array(place) for place in places)]
        return _AxisSample(
            axis, line.reshape(-1), elsewhere, places[axis] if axis < part.ndim else np.zeros(_CHECKED, int)
        )

    def read_runs(self, whole: Sequence[int]) -> tuple[Run, ...] | None:
        """Return the runs of the axis of the ``whole`` shape that these are; None if they are no selection of it.

        An array without that axis has no runs along it.
        """
        line = np.array(self.through_origin)
        positions = _decode(line)
        length = whole[self.axis] if self.axis < len(whole) else 1
        if positions.min() < 0 or positions.max() >= length:
            return None
        if not np.array_equal(np.array(self.elsewhere), line[self.places]):
            return None
        return _join_runs(positions) if self.axis < len(whole) else ()


def _decode(line: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the positions that these are codes of; what is no code becomes -1, or most probably a huge number."""
    codes = line.astype(np.int64)
    positions = (codes.astype(np.uint64) * _INVERSE % _MODULUS).astype(np.int64) - 1
    return np.where((codes == line) & (codes > 0) & (codes < _MODULUS), positions, -1)


def _join_runs(positions: NDArray[np.int64]) -> tuple[Run, ...]:
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in np.split(positions, breaks))
