"""A model as the coordinator knows it: its shape, its tensors and its tokenizer, read without loading a weight.

Of a model of the hub that is not here, only small files and headers are fetched for this.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.errors import InvalidOption
from cluster.limits import MIN_CONTEXT
from cluster.model.device import close_thread
from cluster.model.provenance import TensorMap, tensor_map
from cluster.model.survey import survey
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.store.store import Found, Store
from cluster.types import ModelShape


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``tokenizer`` may know fewer ids than the model has logits; those it knows are taken from clients."""

    shape: ModelShape
    tokenizer: Tokenizer
    tensors: TensorMap
    found: Found

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocab_size


class Reader:
    """Reads checkpoints on one MLX thread of its own, for as long as the coordinator lives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="survey")

    async def read(self, name: str, max_context: int | None, kv_bits: int = 0) -> Checkpoint:
        """Survey a model. Raises ``ModelNotFound``, ``BadCheckpoint``, ``ModelUnsupported`` or ``InvalidOption``, and
        for one of the hub ``ModelForbidden`` or ``HubUnreachable``.
        """
        return await asyncio.wrap_future(self._pool.submit(_read, self._store, name, max_context, kv_bits))

    async def survey(self, name: str, max_context: int | None, kv_bits: int = 0) -> ModelShape:
        """A model's shape alone, from its headers: its tokenizer and weights may be elsewhere. Raises likewise."""
        return await asyncio.wrap_future(self._pool.submit(_surveyed, self._store, name, max_context, kv_bits))

    def close(self) -> None:
        """Give the thread's MLX streams back, and end it."""
        self._pool.submit(close_thread).result()
        self._pool.shutdown()


def _read(store: Store, name: str, max_context: int | None, kv_bits: int) -> Checkpoint:
    found = store.named(name)
    shape = _survey(found, name, max_context, kv_bits)
    return Checkpoint(shape, load_tokenizer(found.folder), tensor_map(found.folder, shape.shared), found)


def _surveyed(store: Store, name: str, max_context: int | None, kv_bits: int) -> ModelShape:
    return _survey(store.named(name), name, max_context, kv_bits)


def _survey(found: Found, name: str, max_context: int | None, kv_bits: int) -> ModelShape:
    if max_context is not None and max_context < MIN_CONTEXT:
        raise InvalidOption(
            f"a context of {max_context} tokens was asked for; at least {MIN_CONTEXT}", field="max_context"
        )
    return survey(found.folder, name, max_context, kv_bits=kv_bits)
