"""A model as the coordinator knows it: its shape, its tensors and its tokenizer, read without loading a weight.

Of a model of the hub that is not here, only small files and headers are fetched for this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import anyio

from cluster.core.errors import InvalidOption
from cluster.core.limits import MIN_CONTEXT
from cluster.core.plan import ModelShape
from cluster.model.device import close_thread
from cluster.model.model_shape import read_shape
from cluster.model.tensor_map import TensorMap, tensor_map
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.sandbox.process import SandboxProcess
from cluster.sandbox.tokenizer import SandboxedTokenizer, TextService
from cluster.store.store import FoundModel, Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """``tokenizer`` may know fewer ids than the model has logits; those it knows are taken from clients.

    ``tokenizer`` decodes what the model says. What clients send goes to ``text``, which bounds the cost.
    """

    shape: ModelShape
    tokenizer: Tokenizer
    tensors: TensorMap
    found: FoundModel
    text: TextService

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocab_size

    async def close(self) -> None:
        """End the processes of ``text``. Requests that they are reading fail."""
        await self.text.close()


class ModelReader:
    """Reads checkpoints on one MLX thread of its own, for as long as the coordinator lives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="survey")

    async def read(self, name: str, max_context: int | None, kv_bits: int = 0) -> ModelInfo:
        """Survey a model. Raises ``ModelNotFound``, ``BadCheckpoint``, ``ModelUnsupported`` or ``InvalidOption``, and
        for one of the hub ``ModelForbidden`` or ``HubUnreachable``.

        The tokenizer is loaded in a process with limits first, which says no to a hostile one.
        """
        process = await SandboxProcess.start()  # its imports take as long as the survey
        try:
            found, shape = await self._on_thread(_found, self._store, name, max_context, kv_bits)
            text = SandboxedTokenizer(found.folder)
            await text.open(process)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await process.stop()
            raise
        try:
            return await self._on_thread(_loaded, found, shape, text)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await text.close()
            raise

    async def survey(self, name: str, max_context: int | None, kv_bits: int = 0) -> ModelShape:
        """A model's shape alone, from its headers: its tokenizer and weights may be elsewhere. Raises likewise."""
        return (await self._on_thread(_found, self._store, name, max_context, kv_bits))[1]

    async def _on_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.wrap_future(self._pool.submit(work, *arguments))

    def close(self) -> None:
        """Give the thread's MLX streams back, and end it."""
        self._pool.submit(close_thread).result()
        self._pool.shutdown()


def _found(store: Store, name: str, max_context: int | None, kv_bits: int) -> tuple[FoundModel, ModelShape]:
    found = store.find_by_name(name)
    return found, _measure_shape(found, name, max_context, kv_bits)


def _loaded(found: FoundModel, shape: ModelShape, text: TextService) -> ModelInfo:
    tensors = tensor_map(found.folder, shape.shared)
    return ModelInfo(shape, load_tokenizer(found.folder), tensors, found, text)


def _measure_shape(found: FoundModel, name: str, max_context: int | None, kv_bits: int) -> ModelShape:
    if max_context is not None and max_context < MIN_CONTEXT:
        raise InvalidOption(
            f"a context of {max_context} tokens was asked for; at least {MIN_CONTEXT}", field="max_context"
        )
    return read_shape(found.folder, name, max_context, kv_bits=kv_bits)
