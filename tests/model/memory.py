"""What MLX holds in memory, for tests that compare it before and after."""

from __future__ import annotations

import gc

import mlx.core as mx


def settled_memory() -> int:
    """Free what earlier tests left in reference cycles, which would go at any moment. Return MLX's active bytes."""
    gc.collect()
    return mx.get_active_memory()
