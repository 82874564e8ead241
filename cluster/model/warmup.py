"""Runs a loaded stage on made-up input in the shapes that will come, so that no request waits for kernels to compile.

A GPU's kernels are compiled when a shape is first seen: tens of seconds for the first tokens on CUDA. It knows frames
and the cut's arrays, and leaves the stage as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

import mlx.core as mx

from cluster.core.errors import MacpipeError
from cluster.core.frames import Compute, Frame, Join, Leave, Step, Tensor
from cluster.core.request import SamplingParams
from cluster.model.stage import Stage
from cluster.model.tensor_codec import dtype_name
from cluster.model.trace import Boundary

__all__ = ["warm"]

CHUNKS: Final = (128, 512)
"""Tokens of a prefill: the shortest and the longest chunk of a long prompt."""
ROWS: Final = (1, 2, 4, 8)
"""Sequences of a decode step; kernels of more rows are those of eight or of a chunk."""


def warm(stage: Stage) -> None:
    """Prefill and decode ``stage``, which holds no sequence, and free all of it again. What fails here fails later."""
    inlet = stage.inlet
    if inlet and any(dim is None for leaf in inlet.leaves for dim in leaf.dims):
        return  # what would come in cannot be made up
    sequences = tuple(range(1, ROWS[-1] + 1))
    joins = tuple(Join(s, 1, SamplingParams()) for s in sequences)
    try:
        stage.step(Frame(stage.spec.epoch, 0, 0, joins))
        for length in CHUNKS:
            if length <= stage.spec.max_context - len(ROWS):
                _run(stage, inlet, Compute.PREFILL, sequences[-1:], length)
        for rows in ROWS if stage.batchable else ROWS[:1]:
            _run(stage, inlet, Compute.DECODE, sequences[:rows], 1)
    except MacpipeError:
        pass  # the canary will say it where it is heard
    finally:
        stage.step(Frame(stage.spec.epoch, 0, 0, tuple(map(Leave, sequences))))
        mx.clear_cache()


def _run(stage: Stage, inlet: Boundary | None, compute: Compute, sequences: Sequence[int], length: int) -> None:
    step = Step(compute, tuple(sequences), ((0,) * length,) * len(sequences))
    tensors = _dummy_input(inlet, len(sequences), length)
    stage.step(Frame(stage.spec.epoch, 0, 0, step=step, tensors=tensors))


def _dummy_input(inlet: Boundary | None, batch: int, length: int) -> tuple[Tensor, ...]:
    """Zeros in the shapes that cross the cut."""
    known = {"batch": batch, "length": length}
    made = []
    for leaf in inlet.leaves if inlet else ():
        shape = tuple(known[dim] if isinstance(dim, str) else dim or 0 for dim in leaf.dims)
        made.append(Tensor(dtype_name(leaf.dtype), shape, bytes(leaf.dtype.size * prod(shape))))
    return tuple(made)
