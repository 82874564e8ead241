"""Loads the weights of one stage, piece by piece, and no others.

It knows the order: check the fingerprint, build the skeleton, trace it, cut it, then evaluate the local weights. Other
weights stay lazy on purpose, so that they are never read. It knows nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from cluster.core.errors import BadCheckpoint, ModelDiffers
from cluster.core.plan import StageSpec
from cluster.model.checkpoint import Checkpoint, open_checkpoint
from cluster.model.module_tree import Module, named_modules, parameters
from cluster.model.part_reader import PartReader
from cluster.model.shard_map import TensorPart, map_parts, record_sources
from cluster.model.sharding import Group, Seat, require_shardable, shard_model
from cluster.model.skeleton import open_skeleton
from cluster.model.slice import ModelSlice
from cluster.model.trace import Trace, trace

__all__ = ["load_slice", "read_arrays"]


def load_slice(
    spec: StageSpec, path: Path, progress: Callable[[int, int], None], group: Group | None = None
) -> tuple[ModelSlice, int, int]:
    """Return the slice with its weights in memory, the vocabulary's size, and the bytes of those weights.

    With a ``group``, the slice is its rank's part of these layers: all ranks have to run it together.

    ``progress(done_bytes, total_bytes)`` is called before the first tensor and after each layer, in a group also after
    each tensor. Raises ModelDiffers if the fingerprint differs, BadCheckpoint if the files cannot be read, and the
    errors of ``open_checkpoint``, ``open_skeleton``, ``trace``, ``ModelSlice`` and ``require_shardable``.
    """
    checkpoint = open_checkpoint(path)
    found = checkpoint.fingerprint
    if found != spec.model.fingerprint:
        raise ModelDiffers(
            f"the files in {str(path)!r} differ from the coordinator's {spec.model.name} (fingerprint "
            f"{found[:12]}, expected {spec.model.fingerprint[:12]}); copy the coordinator's folder to this machine"
        )
    if group:
        model, traced, parts = _open_part(checkpoint, spec, group)
    else:
        model = open_skeleton(path, spec.weight_bits)
        traced, parts = trace(model), {}
    part = ModelSlice(model, traced, spec.layers, spec.kv_bits)
    read = _read_parts(part, path, parts, progress)
    return part, traced.vocabulary, read_arrays(part, lambda done, total: progress(max(read, done), total))


def _open_part(checkpoint: Checkpoint, spec: StageSpec, group: Group) -> tuple[Module, Trace, dict[str, TensorPart]]:
    """Return the sharded model, the trace of the whole one, and what its local arrays are of the files' tensors.

    Local arrays that sharding has cut, but that are no parts of tensors, are computed from whole tensors. They become
    copies, so that these tensors do not stay in memory.
    """
    with record_sources(checkpoint.tensors) as find_sources:
        model = open_skeleton(checkpoint.path, spec.weight_bits)
    traced = trace(model)
    require_shardable(model, group.size())

    def is_local(path: str) -> bool:
        return traced.is_local(path.rpartition(".")[0], spec.layers)

    parts = map_parts(model, find_sources(model), Seat(group.rank(), group.size()), is_local)
    before = parameters(model)
    shard_model(model, group)
    modules = dict(named_modules(model))
    for path, array in parameters(model).items():
        if path not in parts and is_local(path) and array is not before.get(path):
            module, _, key = path.rpartition(".")
            modules[module][key] = mx.contiguous(array)
    return model, traced, parts


def _read_parts(
    part: ModelSlice, path: Path, parts: Mapping[str, TensorPart], progress: Callable[[int, int], None]
) -> int:
    """Read the slice's arrays that are parts of tensors. Return their bytes."""
    total, done = sum(array.nbytes for piece in _pieces(part) for array in piece), 0

    def read() -> Iterator[tuple[str, mx.array]]:
        nonlocal done
        with PartReader(path) as reader:
            for name, wanted in parts.items():
                progress(done, total)
                array = reader.read(wanted)
                done += array.nbytes
                yield name, array

    if parts:
        part.set_arrays(read())
    return done


def read_arrays(part: ModelSlice, progress: Callable[[int, int], None]) -> int:
    """Evaluate a slice's arrays and return their bytes. ``progress`` is that of ``load_slice``.

    It goes array by array, so that only an array built from parts (stacked experts) exists twice at a time. Raises
    BadCheckpoint if the files cannot be read.
    """
    total = sum(array.nbytes for piece in _pieces(part) for array in piece)
    done = 0
    progress(done, total)
    for piece in _pieces(part):
        for array in piece:
            _evaluate(array)
        mx.clear_cache()
        done += sum(array.nbytes for array in piece)
        progress(done, total)
    return total


def _evaluate(array: mx.array) -> None:
    try:
        mx.eval(array)
    except RuntimeError as error:  # MLX raises this for files that vanish or shrink during the read
        raise BadCheckpoint(f"the model's files could not be read: {error}") from error


def _pieces(part: ModelSlice) -> Iterator[list[mx.array]]:
    """Return the units of progress: the modules outside the layers, then each layer."""
    yield part.outside_arrays()
    for layer in range(part.layers.start, part.layers.end):
        yield part.layer_arrays(layer)
