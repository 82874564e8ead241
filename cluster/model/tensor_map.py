"""Maps each layer, and each module outside the layers, to the file tensors that it is built from.

When mlx-lm opens a model it renames, splits, stacks and drops tensors, differently for each architecture. So this
module opens the model with stand-ins for the files' tensors and looks up in MLX's lazy graph which stand-ins each
weight depends on. It reads headers but no tensors. It knows names of tensors and modules, nothing of who holds or
fetches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from cluster.core.plan import SharedWeight, TensorMap
from cluster.model.checkpoint import TensorInfo, open_checkpoint
from cluster.model.lazy_graph import LazyGraph
from cluster.model.module_tree import module_arrays, named_modules
from cluster.model.skeleton import open_skeleton

__all__ = ["tensor_map"]

DTYPES: Final[Mapping[str, mx.Dtype]] = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "U32": mx.uint32,
    "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64, "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32,
    "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8, "F8_E8M0": mx.uint8, "F4": mx.uint8, "C64": mx.complex64,
}  # fmt: skip
"""MLX's type for each type of the format; MLX reads the small floats as bytes."""


def tensor_map(path: Path, shared: Sequence[SharedWeight]) -> TensorMap:
    """Map the checkpoint in ``path``; ``shared`` is that of its ``ModelShape``. Raises as ``open_skeleton``."""
    tensors = open_checkpoint(path).tensors
    with _zeros_loaded(tensors) as zeros:
        model = open_skeleton(path)
    groups = [_join_arrays(a for _, m in named_modules(layer) for a in module_arrays(m)) for layer in model.layers]
    modules = dict(named_modules(model))
    groups += [_join_arrays(module_arrays(modules[weight.name])) for weight in shared]
    mx.eval(zeros)
    graph = LazyGraph(zeros, groups)
    names = [frozenset(graph.parameters_in(graph.ancestors([group]))) for group in groups]
    count = len(model.layers)
    return TensorMap(
        tuple(names[:count]),
        tuple((found, weight.layers) for found, weight in zip(names[count:], shared, strict=True)),
    )


@contextmanager
def _zeros_loaded(tensors: Mapping[str, TensorInfo]) -> Iterator[dict[str, mx.array]]:
    """Make ``mx.load`` return, inside the block, zeros of each tensor's shape and dtype instead of the tensors."""
    zeros = {t.name: mx.broadcast_to(mx.zeros((), DTYPES[t.dtype]), t.shape) for t in tensors.values()}
    mx.eval(zeros)
    module = mx
    original = mx.load

    def load(file: Any, *_args: Any, **_kwargs: Any) -> dict[str, mx.array]:
        name = Path(file).name
        return {t.name: zeros[t.name] for t in tensors.values() if t.file == name}

    module.load = load
    try:
        yield zeros
    finally:
        module.load = original


def _join_arrays(arrays: Iterable[mx.array]) -> mx.array:
    """Return one array that depends on all ``arrays``: a graph can name only about a thousand arrays."""
    sums = [mx.sum(array).astype(mx.float32) for array in arrays]
    return mx.stack(sums) if sums else mx.zeros(())
