"""Runs a loaded stage on dummy input of the expected shapes, so that no request waits for kernels to compile.

A GPU's kernels are compiled at the first use of a shape: tens of seconds for the first tokens on CUDA. It knows frames
and the cut's arrays, and leaves the stage unchanged.
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
"""Tokens of the prefills: the shortest and the longest chunk of a long prompt."""
ROWS: Final = (1, 2, 4, 8)
"""Rows of the decode steps; more rows use the kernels of eight rows or of a chunk."""


def warm(stage: Stage) -> None:
    """Run prefills and decodes on ``stage``, which must hold no sequence, and free their caches again.

    Errors are ignored: the canary will fail in the same way and report it.
    """
    inlet = stage.inlet
    if inlet and any(dim is None for leaf in inlet.leaves for dim in leaf.dims):
        return  # the shape of the incoming arrays is unknown
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
        pass  # the canary fails in the same way and reports it
    finally:
        stage.step(Frame(stage.spec.epoch, 0, 0, tuple(map(Leave, sequences))))
        mx.clear_cache()


def _run(stage: Stage, inlet: Boundary | None, compute: Compute, sequences: Sequence[int], length: int) -> None:
    step = Step(compute, tuple(sequences), ((0,) * length,) * len(sequences))
    tensors = _dummy_input(inlet, len(sequences), length)
    stage.step(Frame(stage.spec.epoch, 0, 0, step=step, tensors=tensors))


def _dummy_input(inlet: Boundary | None, batch: int, length: int) -> tuple[Tensor, ...]:
    """Return zeros in the shapes that cross the cut."""
    known = {"batch": batch, "length": length}
    made = []
    for leaf in inlet.leaves if inlet else ():
        shape = tuple(known[dim] if isinstance(dim, str) else dim or 0 for dim in leaf.dims)
        made.append(Tensor(dtype_name(leaf.dtype), shape, bytes(leaf.dtype.size * prod(shape))))
    return tuple(made)
