"""Tables of every possible stage of a model: a matrix per worker with the seconds between any two clean cuts.

Rows and columns are positions among the cuts: where a stage begins and where it ends. An empty stage and a stage that
does not fit the worker are infinitely slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.core.limits import REFERENCE_CONTEXT
from cluster.core.plan import LayerRange, ModelShape, SharedWeight
from cluster.placement.candidates import Candidate
from cluster.placement.predicted_step_time import (
    EXPERT_COST,
    ROUTER_LAUNCHES,
    boundary_bytes,
    read_experts,
    shared_read,
    sparse_layers,
)

__all__ = ["Matrix", "StageTable"]

Matrix: TypeAlias = npt.NDArray[np.float64]


class StageTable:
    """The bytes of every stage of ``shape``, computed once. ``seconds`` derives a worker's matrix from them.

    For workers that are groups there is one of a rank's parts for each number of ranks, made when it is first needed.
    """

    def __init__(self, shape: ModelShape, sequences: int) -> None:
        self._shape, self._sequences = shape, sequences
        self._of_ranks: dict[int, StageTable] = {1: self}
        self.positions = (0, *shape.clean_cuts, shape.layers)
        self.fingerprint = shape.model.fingerprint
        cuts = np.array(self.positions)
        self.lengths: Matrix = (cuts[None, :] - cuts[:, None]).astype(np.float64)
        self.boundary: Matrix = np.array([boundary_bytes(shape, p) if p < shape.layers else 0 for p in cuts], float)
        self.needed = self._between(shape.layer_bytes) + sequences * self._between(shape.cache_bytes)
        self.launches = self.lengths + ROUTER_LAUNCHES * self._between(sparse_layers(shape))
        self.read = self._between(shape.active_bytes or shape.layer_bytes)
        self.read += (EXPERT_COST - 1) * self._between(_active_experts(shape))
        self.read += self._between(_reference_caches(shape))
        for weight in shape.shared:
            self._add(weight, shape.layers)

    def _between(self, of_layers: Sequence[float]) -> Matrix:
        sums = np.array([0, *accumulate(of_layers)], float)[list(self.positions)]
        return np.asarray(sums[None, :] - sums[:, None])

    def _add(self, weight: SharedWeight, layers: int) -> None:
        """Add a weight outside the layers: every stage with one of its layers holds it and reads it once."""
        for i, start in enumerate(self.positions):
            for j, end in enumerate(self.positions[i + 1 :], i + 1):
                if any(start <= layer < end for layer in weight.layers):
                    self.needed[i, j] += weight.nbytes
                    self.read[i, j] += shared_read(weight, LayerRange(start, end), layers, 1)

    def seconds(self, worker: Candidate, *, unbounded: bool = False) -> Matrix:
        """Return a decode step's seconds on every stage that fits ``worker``, or on every stage if ``unbounded``.

        They are those of ``decode_s`` for one row.
        """
        if worker.ranks not in self._of_ranks:
            self._of_ranks[worker.ranks] = StageTable(self._shape.of_rank(worker.ranks), self._sequences)
        return self._of_ranks[worker.ranks]._seconds(worker, unbounded=unbounded)

    def _seconds(self, worker: Candidate, *, unbounded: bool) -> Matrix:
        profile = worker.profile
        seconds = profile.step_s + self.launches * profile.layer_s + self.read / profile.bandwidth
        seconds = seconds * profile.correction(self.fingerprint)
        impossible = self.lengths <= 0
        if not unbounded:
            impossible |= self.needed > worker.memory.usable
        return np.where(impossible, np.inf, seconds)


def _active_experts(shape: ModelShape) -> tuple[float, ...]:
    """Return the bytes of experts that one token reads, per layer."""
    return tuple(read_experts(shape, LayerRange(i, i + 1)) for i in range(shape.layers))


def _reference_caches(shape: ModelShape) -> tuple[int, ...]:
    """Return the cache bytes per layer of one sequence of the reference length."""
    layers = range(shape.layers)
    context = min(REFERENCE_CONTEXT, shape.max_context)
    return tuple(shape.stage_cache_bytes(LayerRange(i, i + 1), context) for i in layers)
