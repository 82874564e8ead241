"""Predicts a stage's seconds per decode step or prompt chunk, from bytes, operations and a worker's profile.

``decode_s`` is the reference. ``StageTable.seconds`` is the same formula for one row, as a matrix over all stages; a
test in ``tests/placement/test_search.py`` keeps them equal. Neither knows how profiles were measured.
"""

from __future__ import annotations

from typing import Final

from cluster.core.limits import PREFILL_CHUNK, REFERENCE_CONTEXT
from cluster.core.plan import LayerRange, ModelShape, Profile, SharedWeight

__all__ = [
    "EXPERT_COST",
    "ROUTER_LAUNCHES",
    "boundary_bytes",
    "decode_s",
    "fixed_s",
    "prefill_s",
    "read_bytes",
    "read_experts",
    "sparse_layers",
    "verify_s",
]

ROUTER_LAUNCHES: Final = 0.5
"""What a layer with experts takes to start beyond ``layer_s``, as a share of it: its router chooses, gathers and sums.

This and ``EXPERT_COST`` fit mlx-lm's published speeds with 4-bit weights: Qwen3-235B-A22B with 25 to 30 tokens/s on an
M3 Ultra, and Qwen3.5-35B-A3B with 133 on an M5 Max. Corrections learned from frames do the rest.
"""
EXPERT_COST: Final = 1.25
"""How often the bytes of experts take the time of as many bytes of one matrix: few rows of each expert are gathered."""


def decode_s(
    shape: ModelShape, profile: Profile, layers: LayerRange, rows: int = 1, context: int = REFERENCE_CONTEXT
) -> float:
    """Return the seconds of a decode step of ``rows`` rows with ``context`` tokens each; 0 if the speed is unknown."""
    if not profile.known:
        return 0.0
    # A row never costs more than a step of its own: rows can always run one after another.
    additional_rows = (rows - 1) * min(profile.row_cost, 1.0)
    weights = read_bytes(shape, layers, rows) + additional_rows * _dense_bytes(shape, layers)
    caches = rows * shape.stage_cache_bytes(layers, min(context, shape.max_context))
    gathered = (EXPERT_COST - 1) * read_experts(shape, layers, rows)
    seconds = fixed_s(shape, profile, layers) + (weights + gathered + caches) / profile.bandwidth
    return seconds * profile.correction(shape.model.fingerprint)


def verify_s(
    shape: ModelShape, profile: Profile, layers: LayerRange, tokens: int, context: int = REFERENCE_CONTEXT
) -> float | None:
    """Return the seconds of a step of ``tokens`` tokens of one sequence; None if no such step was measured.

    They read the sequence's caches once. Like rows, they choose experts independently.
    """
    cost = 1.0 if tokens == 1 else dict(profile.verify_costs).get(tokens)
    if not profile.known or cost is None:
        return None
    dense = _dense_bytes(shape, layers)
    experts = read_bytes(shape, layers, tokens) - dense + (EXPERT_COST - 1) * read_experts(shape, layers, tokens)
    caches = shape.stage_cache_bytes(layers, min(context, shape.max_context))
    seconds = fixed_s(shape, profile, layers) + (cost * dense + experts + caches) / profile.bandwidth
    return seconds * profile.correction(shape.model.fingerprint)


def prefill_s(shape: ModelShape, profile: Profile, layers: LayerRange, tokens: int = PREFILL_CHUNK) -> float:
    """Return the seconds of one prompt chunk: its operations, or reading every weight once if that takes longer."""
    work = tokens * sum(shape.flops[layers.start : layers.end]) / profile.flops if profile.flops else 0.0
    weights = sum(shape.layer_bytes[layers.start : layers.end]) / profile.bandwidth
    return fixed_s(shape, profile, layers) + max(work, weights)


def fixed_s(shape: ModelShape, profile: Profile, layers: LayerRange) -> float:
    """Return the seconds of a step that do not depend on bytes: starting it, and launching each layer's kernels."""
    sparse = sum(sparse_layers(shape)[layers.start : layers.end])
    return profile.step_s + (len(layers) + ROUTER_LAUNCHES * sparse) * profile.layer_s


def sparse_layers(shape: ModelShape) -> tuple[int, ...]:
    """Return 1 for each layer with experts, 0 for each other layer."""
    return tuple(int(nbytes > 0) for nbytes in shape.expert_bytes) or (0,) * shape.layers


def read_experts(shape: ModelShape, layers: LayerRange, rows: int = 1) -> float:
    """Return the average bytes of experts that a decode step of ``rows`` rows reads on a stage."""
    whole = sum(shape.layer_bytes[layers.start : layers.end]) - sum(shape.expert_bytes[layers.start : layers.end])
    read = sum(_layer_read(shape, i, rows) for i in range(layers.start, layers.end))
    return read - whole if shape.expert_bytes else 0.0


def read_bytes(shape: ModelShape, layers: LayerRange, rows: int = 1) -> float:
    """Return the average bytes of weights that a decode step of ``rows`` rows reads on a stage."""
    shared = sum(shared_read(w, layers, shape.layers, rows) for w in shape.shared)
    return shared + sum(_layer_read(shape, i, rows) for i in range(layers.start, layers.end))


def _dense_bytes(shape: ModelShape, layers: LayerRange) -> float:
    """Return the bytes that every further row uses again. ``read_bytes`` already counts experts by rows."""
    return read_bytes(shape, layers) - read_experts(shape, layers)


def shared_read(weight: SharedWeight, layers: LayerRange, count: int, rows: int) -> int:
    """Return the bytes that a step reads of a weight outside the layers, on a stage of a model of ``count`` layers."""
    if not any(layers.start <= i < layers.end for i in weight.layers):
        return 0
    if weight.lookup_bytes is None or (weight.head and layers.end == count):
        return weight.nbytes
    return rows * weight.lookup_bytes


def _layer_read(shape: ModelShape, layer: int, rows: int) -> float:
    """Return the average bytes of a layer's weights that a step reads.

    Rows choose experts independently: n rows that each use a share s of the experts touch 1 - (1 - s)^n of them.
    """
    whole = shape.layer_bytes[layer]
    active = shape.active_bytes[layer] if shape.active_bytes else whole
    experts = shape.expert_bytes[layer] if shape.expert_bytes else 0
    if rows == 1 or not experts:
        return active
    share = 1 - (whole - active) / experts
    return whole - experts * (1 - share) ** rows


def boundary_bytes(shape: ModelShape, cut: int) -> int:
    """Return the bytes per token that cross the cut before layer ``cut``."""
    return shape.boundary_bytes[cut] if shape.boundary_bytes else 0
