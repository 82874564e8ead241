"""A model as the coordinator knows it: its shape and its tokenizer, read from the folder without loading a weight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anyio

from cluster.model.checkpoint import resolve_model
from cluster.model.device import close_thread
from cluster.model.survey import survey
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.types import ModelShape


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``tokenizer`` may know fewer ids than the model has logits; those it knows are taken from clients."""

    shape: ModelShape
    tokenizer: Tokenizer

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocab_size


async def read_checkpoint(name: str, max_context: int | None) -> Checkpoint:
    """Survey a model. Raises ``ModelNotFound``, ``BadCheckpoint``, ``ModelUnsupported`` or ``InvalidOption``."""
    return await anyio.to_thread.run_sync(_read, name, max_context)


def _read(name: str, max_context: int | None) -> Checkpoint:
    path = resolve_model(name)
    return Checkpoint(_shape(path, name, max_context), load_tokenizer(path))


def _shape(path: Path, name: str, max_context: int | None) -> ModelShape:
    """Trace on a thread of its own, which gives its MLX streams back before it ends."""
    with ThreadPoolExecutor(1, thread_name_prefix="survey") as pool:
        try:
            return pool.submit(survey, path, name, max_context).result()
        finally:
            pool.submit(close_thread).result()
