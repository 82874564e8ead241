"""Estimates what training keeps in memory beside the weights, so that what cannot fit is refused before a load."""

from __future__ import annotations

from cluster.core.errors import DoesNotFit
from cluster.core.limits import GIB, SCORE_BYTES
from cluster.core.plan import LayerRange, ModelShape, Plan
from cluster.core.text import count_in_words
from cluster.core.training import TrainingOptions

__all__ = ["require_room", "training_bytes"]

_VALUES = 2.3
"""Bytes of a layer's values for one token, over its operations by the bytes of its width. Measured for prompts."""
_LOGITS = 12
"""Bytes of a logit: itself, its exponential and its gradient."""


def training_bytes(
    shape: ModelShape, layers: LayerRange, rows: int, length: int, batches: int, *, recompute: bool
) -> int:
    """Return about how many bytes a stage with these layers keeps of ``batches`` batches of ``rows`` sequences.

    Each value that a layer computes is kept for the way back, and attention scores in full, since no kernel has a way
    back that keeps them to itself. With ``recompute``, only what enters each layer, what leaves the stage and room for
    its gradient are kept, and one layer at a time is computed again. The result is 0 if the model's sizes are unknown.
    """
    width = max(shape.boundary_bytes, default=0)
    flops = shape.flops[layers.start : layers.end]
    if not (width and flops and shape.heads):
        return 0
    scores = shape.heads * SCORE_BYTES * length
    each = [_VALUES * own / width + scores for own in flops]
    token = max(each) + (len(layers) + 2) * width * batches if recompute else sum(each) * batches
    if layers.end == shape.layers:
        token += _LOGITS * shape.vocabulary
    return int(token * rows * length)


def require_room(plan: Plan, shape: ModelShape, options: TrainingOptions, length: int) -> None:
    """Raise ``DoesNotFit`` if batches of sequences of ``length`` tokens cannot fit beside a stage's weights."""
    count = len(plan.stages)
    rows = -(-options.batch_size // options.micro_batches)
    together = options.grad_accumulation_steps * min(options.micro_batches, options.batch_size)
    first = shape.layers - options.num_layers if options.num_layers > 0 else 0
    for i, stage in enumerate(plan.stages):
        if first >= stage.layers.end:
            continue  # it only passes batches on
        trained = LayerRange(max(stage.layers.start, first), stage.layers.end)
        batches = 1 if i == count - 1 else min(count + 1 - i, together)
        recompute = options.grad_checkpoint
        need = training_bytes(shape, trained, rows, length, batches, recompute=recompute)
        if need > stage.cache_bytes:
            hint = "" if recompute else ", or use --grad-checkpoint"
            lower = "--batch-size or --max-seq-length" if rows > 1 else "--max-seq-length"
            raise DoesNotFit(
                f"training {plan.model.name} with {count_in_words(rows, 'sequence')} of {length} tokens at a time "
                f"needs about {need / GIB:.1f} GiB beside the weights on {stage.worker} (layers {stage.layers}), which "
                f"has {stage.cache_bytes / GIB:.1f} GiB left; lower {lower}{hint}"
            )
