"""mlx-lm's answer in one process, which any number of stages must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from cluster.core.limits import PREFILL_CHUNK


def greedy(
    folder: Path, prompt: Sequence[int], tokens: int, kv_bits: int | None = None, adapter: Path | None = None
) -> tuple[int, ...]:
    """Greedy token ids, end-of-sequence tokens among them; with ``adapter`` as of ``--adapter-path``."""
    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=tokens,
        prefill_step_size=PREFILL_CHUNK,
        kv_bits=kv_bits,
        quantized_kv_start=0,
    )
    return tuple(int(token) for token, _ in steps)
