"""What a stage costs: seconds of a decode step or a prompt's chunk, from bytes, operations and a worker's profile.

The one place where a speed is predicted. It knows shapes and profiles, and nothing of how they were measured.
"""

from __future__ import annotations

from cluster.core.limits import PREFILL_CHUNK, REFERENCE_CONTEXT
from cluster.core.plan import LayerRange, ModelShape, Profile, SharedWeight

__all__ = ["boundary_bytes", "decode_s", "fixed_s", "prefill_s", "read_bytes"]


def decode_s(
    shape: ModelShape, profile: Profile, layers: LayerRange, rows: int = 1, context: int = REFERENCE_CONTEXT
) -> float:
    """Seconds of one decode step of so many rows, each with a context of so many tokens; 0 for an unknown speed."""
    if not profile.known:
        return 0.0
    more = (rows - 1) * min(profile.row_cost, 1.0)  # rows can be run one after another, whatever was measured once
    weights = read_bytes(shape, layers, rows) + more * _dense_bytes(shape, layers)
    caches = rows * shape.stage_cache_bytes(layers, min(context, shape.max_context))
    seconds = fixed_s(profile, len(layers)) + (weights + caches) / profile.bandwidth
    return seconds * profile.correction(shape.model.fingerprint)


def prefill_s(shape: ModelShape, profile: Profile, layers: LayerRange, tokens: int = PREFILL_CHUNK) -> float:
    """Seconds of one chunk of a prompt: its operations, or reading every weight once where that takes longer."""
    work = tokens * sum(shape.flops[layers.start : layers.end]) / profile.flops if profile.flops else 0.0
    weights = sum(shape.layer_bytes[layers.start : layers.end]) / profile.bandwidth
    return fixed_s(profile, len(layers)) + max(work, weights)


def fixed_s(profile: Profile, layers: int) -> float:
    """Seconds of a step that depend on no byte: starting it, and launching each layer's kernels."""
    return profile.step_s + layers * profile.layer_s


def read_bytes(shape: ModelShape, layers: LayerRange, rows: int = 1) -> float:
    """Bytes of weights that a decode step of so many rows reads on that stage, on average."""
    shared = sum(shared_read(w, layers, shape.layers, rows) for w in shape.shared)
    return shared + sum(_layer_read(shape, i, rows) for i in range(layers.start, layers.end))


def _dense_bytes(shape: ModelShape, layers: LayerRange) -> float:
    """Of those, what every row goes through anew; rows of experts have their bytes counted already."""
    experts = shape.expert_bytes[layers.start : layers.end]
    whole, active = shape.layer_bytes, shape.active_bytes or shape.layer_bytes
    idle = sum(whole[i] - active[i] for i in range(layers.start, layers.end))
    return read_bytes(shape, layers) - (sum(experts) - idle)


def shared_read(weight: SharedWeight, layers: LayerRange, count: int, rows: int) -> int:
    """What a step reads of a weight outside the layers on that stage of a model of ``count`` layers."""
    if not any(layers.start <= i < layers.end for i in weight.layers):
        return 0
    if weight.lookup_bytes is None or (weight.head and layers.end == count):
        return weight.nbytes
    return rows * weight.lookup_bytes


def _layer_read(shape: ModelShape, layer: int, rows: int) -> float:
    """Rows choose their experts independently: n rows that use a share s of them each touch 1 - (1 - s)^n."""
    whole = shape.layer_bytes[layer]
    active = shape.active_bytes[layer] if shape.active_bytes else whole
    experts = shape.expert_bytes[layer] if shape.expert_bytes else 0
    if rows == 1 or not experts:
        return active
    share = 1 - (whole - active) / experts
    return whole - experts * (1 - share) ** rows


def boundary_bytes(shape: ModelShape, cut: int) -> int:
    """What crosses the cut before layer ``cut`` for one token."""
    return shape.boundary_bytes[cut] if shape.boundary_bytes else 0
