"""Loads the weights of one stage, piece by piece, and no others.

It knows the order: check the fingerprint, build the skeleton, trace it, cut it, then evaluate the local weights. Other
weights stay lazy on purpose, so that they are never read. It knows nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from cluster.core.errors import BadCheckpoint, ModelDiffers
from cluster.core.plan import StageSpec
from cluster.model.checkpoint import open_checkpoint
from cluster.model.skeleton import open_skeleton
from cluster.model.slice import ModelSlice
from cluster.model.trace import trace

__all__ = ["load_slice", "read_arrays"]


def load_slice(spec: StageSpec, path: Path, progress: Callable[[int, int], None]) -> tuple[ModelSlice, int, int]:
    """Return the slice with its weights in memory, the vocabulary's size, and the bytes of those weights.

    ``progress(done_bytes, total_bytes)`` is called before the first tensor and after each layer. Raises ModelDiffers if
    the fingerprint differs, BadCheckpoint if the files cannot be read, and the errors of ``open_checkpoint``,
    ``open_skeleton``, ``trace`` and ``ModelSlice``.
    """
    found = open_checkpoint(path).fingerprint
    if found != spec.model.fingerprint:
        raise ModelDiffers(
            f"the files in {str(path)!r} differ from the coordinator's {spec.model.name} (fingerprint "
            f"{found[:12]}, expected {spec.model.fingerprint[:12]}); copy the coordinator's folder to this machine"
        )
    model = open_skeleton(path, spec.weight_bits)
    traced = trace(model)
    part = ModelSlice(model, traced, spec.layers, spec.kv_bits)
    return part, traced.vocabulary, read_arrays(part, progress)


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
