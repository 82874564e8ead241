"""Read a model's shape, tensor map and tokenizer without loading weights.

For a model of the hub that is not on this Mac, fetch only small files and headers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import anyio

from cluster.coordinator.served_adapters import ServedAdapters
from cluster.coordinator.settings import LoadOrder
from cluster.core.adapter import Adapter, count_adapters, require_adapter_name
from cluster.core.errors import InvalidGrammar, InvalidOption, MacpipeError, ModelNotFound, NotServing
from cluster.core.futures import ignore_error
from cluster.core.limits import MIN_CONTEXT
from cluster.core.plan import ModelShape, Speculation, TensorMap
from cluster.core.request import Grammar
from cluster.model.adapters import read_adapter
from cluster.model.checkpoint import open_checkpoint
from cluster.model.device import close_thread
from cluster.model.model_shape import read_shape
from cluster.model.sentence_embedding import NO_EMBEDDINGS, SentenceEmbedding, read_sentence_embedding
from cluster.model.tensor_map import tensor_map
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.placement.group_choice import list_sizes
from cluster.sandbox.process import SandboxProcess
from cluster.sandbox.sandboxed_tokenizer import SandboxedTokenizer, TextService
from cluster.store.store import FoundModel, Store

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the coordinator knows of a model.

    ``tokenizer`` decodes the model's output. Text from clients goes to ``text`` instead, which bounds the cost. The
    tokenizer may know fewer ids than the model has logits; clients may send only ids that it knows.

    ``adapters`` are those of the served model; all copies share them. ``adapter`` is the one that a request chose.
    """

    shape: ModelShape
    tokenizer: Tokenizer
    tensors: TensorMap
    found: FoundModel
    text: TextService
    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    adapter: Adapter | None = None
    speculates: bool = False
    """Whether tokens may be guessed before they are sampled."""
    embedding: SentenceEmbedding = NO_EMBEDDINGS
    """How hidden states become embeddings, or why they cannot."""

    @property
    def placed_shape(self) -> ModelShape:
        """The model's shape with the adapters that its stages hold."""
        return count_adapters(self.shape, self.adapters.loaded)

    def is_same_load(self, other: ModelInfo) -> bool:
        """Return whether both describe the same load of a model, whatever adapters they chose."""
        return self.text is other.text

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocab_size

    async def check_grammar(self, grammar: Grammar, max_bytes: int) -> None:
        """Check at a bounded cost, before a request is accepted, that its grammar can be enforced.

        Raises ``InvalidGrammar`` if the grammar has more than ``max_bytes``, does not compile (with the reason) or is
        too costly, and ``Busy`` if too many checks are waiting.
        """
        size = len(grammar.source.encode())
        if size > max_bytes:
            raise InvalidGrammar(
                f"the {grammar.kind.value} has {size} bytes; the limit is {max_bytes} (--max-schema-bytes)",
                field=grammar.kind.value,
            )
        await self.text.check_grammar(grammar)

    async def close(self) -> None:
        """End the processes of ``text``, and let the model be removed from the store.

        Requests that are being tokenized fail.
        """
        self.release()
        await self.text.close()

    def release(self) -> None:
        """Let the model be removed from the store: this object may outlive the load."""
        if self.found.partial:
            self.found.partial.release()


class ModelReader:
    """Reads checkpoints on its own MLX thread, which lives until ``close``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model-reader")
        self._ahead: dict[LoadOrder, asyncio.Task[ModelInfo]] = {}
        """What is read ahead, or has been, by its order."""

    async def read_ahead(self, *orders: LoadOrder) -> None:
        """Begin to read the models of these orders, so that the next ``read`` of one need not wait for its tokenizer.

        Drop what was read ahead by other orders.
        """
        for order in self._ahead.keys() - set(orders):
            await _drop(self._ahead.pop(order))
        for order in orders:
            if order not in self._ahead:
                self._ahead[order] = asyncio.create_task(self._read_for_later(order))
                self._ahead[order].add_done_callback(ignore_error)  # ``read`` tries again

    @property
    def is_ahead(self) -> bool:
        """Whether all that ``read_ahead`` was asked for has been read."""
        return all(one.done() and not one.cancelled() and not one.exception() for one in self._ahead.values())

    async def read(self, order: LoadOrder) -> ModelInfo:
        """Read an order's model. The tokenizer is first loaded in a sandboxed process, which rejects a hostile one.

        Raises ``ModelNotFound``, ``BadCheckpoint``, ``ModelUnsupported`` or ``InvalidOption``, and for a model of the
        hub also ``ModelForbidden`` or ``HubUnreachable``.
        """
        return await self._take_ahead(order) or await self._read_now(order)

    async def _read_for_later(self, order: LoadOrder) -> ModelInfo:
        model_info = await self._read_now(order)
        log.info("model: read ahead model=%s", order.model)
        return model_info

    async def _take_ahead(self, order: LoadOrder) -> ModelInfo | None:
        """Return what was read ahead by this order, unless that failed or the model's files are others now."""
        reading = self._ahead.pop(order, None)
        if reading is None:
            return None
        try:
            ref = (await reading).shape.model
            if (await self._on_thread(open_checkpoint, Path(ref.path))).fingerprint == ref.fingerprint:
                return reading.result()
        except MacpipeError as e:
            log.info("model: read ahead in vain reason=%s model=%s", e.sentence, order.model)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _drop(reading)
            raise
        await _drop(reading)
        return None

    async def _read_now(self, order: LoadOrder) -> ModelInfo:
        process = await SandboxProcess.start()  # started first, since its imports take as long as reading the headers
        try:
            found, shape = await self._on_thread(_find_model, self._store, order)
            text = SandboxedTokenizer(found.folder, split_points=not shape.trimmable)
            await text.open(process)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await process.stop()
            raise
        try:
            return await self._on_thread(_load_info, found, shape, text, order)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await text.close()
            raise

    async def read_shape(self, order: LoadOrder) -> ModelShape:
        """Read only a model's shape with its adapters, from headers: tokenizer and weights may be elsewhere.

        Raises the errors of ``read``.
        """
        return await self._on_thread(_find_placed_shape, self._store, order)

    async def read_adapter(self, name: str, folder: str, model_info: ModelInfo) -> Adapter:
        """Read an adapter of a model that was read. Raises the errors of ``adapters.read_adapter``."""
        require_adapter_name(name)
        found = model_info.found.folder
        return await self._on_thread(read_adapter, name, adapter_folder(folder), found, model_info.shape)

    async def _on_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Return the result of ``work``. Raises ``NotServing`` after ``close``, and its errors."""
        try:
            future = self._pool.submit(work, *arguments)
        except RuntimeError:
            raise NotServing("the coordinator is stopping") from None
        return await asyncio.wrap_future(future)

    async def close(self) -> None:
        """Drop what was read ahead, release the thread's MLX streams and end it."""
        await self.read_ahead()
        await self._on_thread(close_thread)
        await anyio.to_thread.run_sync(self._pool.shutdown)


async def _drop(reading: asyncio.Task[ModelInfo]) -> None:
    """Stop reading a model, and end its processes."""
    reading.cancel()
    await asyncio.wait((reading,))
    if not reading.cancelled() and reading.exception() is None:
        await reading.result().close()


def _find_model(store: Store, order: LoadOrder) -> tuple[FoundModel, ModelShape]:
    found = store.find_by_name(order.model)
    return found, _measure_shape(found, order)


def _find_placed_shape(store: Store, order: LoadOrder) -> ModelShape:
    found, shape = _find_model(store, order)
    return count_adapters(shape, read_order_adapters(found.folder, order, shape))


def _load_info(found: FoundModel, shape: ModelShape, text: TextService, order: LoadOrder) -> ModelInfo:
    adapters = ServedAdapters(read_order_adapters(found.folder, order, shape))
    tensors = tensor_map(found.folder, shape.shared)
    return ModelInfo(
        shape,
        load_tokenizer(found.folder),
        tensors,
        found,
        text,
        adapters,
        speculates=order.speculation is not Speculation.OFF,
        embedding=read_sentence_embedding(found.folder),
    )


def _measure_shape(found: FoundModel, order: LoadOrder) -> ModelShape:
    if order.max_context is not None and order.max_context < MIN_CONTEXT:
        raise InvalidOption(
            f"max_context is {order.max_context} tokens; it must be at least {MIN_CONTEXT}", field="max_context"
        )
    return _read_base_shape(found.folder, order)


def read_order_shape(folder: Path, order: LoadOrder, possible_ranks: Collection[int] = ()) -> ModelShape:
    """Return the shape of an order's checkpoint, which is in ``folder``, with the adapters of the order.

    ``possible_ranks`` are as in ``read_shape``. Raises the errors of ``read_shape`` and ``read_order_adapters``.
    """
    shape = _read_base_shape(folder, order, possible_ranks)
    return count_adapters(shape, read_order_adapters(folder, order, shape))


def read_order_adapters(folder: Path, order: LoadOrder, shape: ModelShape) -> list[Adapter]:
    """Return the adapters of an order for the model in ``folder``. Raises the errors of ``adapters.read_adapter``."""
    for name, _ in order.adapters:
        require_adapter_name(name)
    return [read_adapter(name, adapter_folder(place), folder, shape) for name, place in order.adapters]


def choose_adapter(model_info: ModelInfo, name: str, field: str = "adapter") -> ModelInfo:
    """Return the model with the adapter of that name chosen; "" for none. Raises ``ModelNotFound``.

    ``field`` is where the client named it.
    """
    if not name:
        return model_info
    if adapter := model_info.adapters.find(name):
        return replace(model_info, adapter=adapter)
    served = ", ".join(a.ref.name for a in model_info.adapters.served) or "none"
    raise ModelNotFound(f"the adapter {name[:64]} is not served here; served are: {served}", field=field)


def adapter_folder(written: str) -> Path:
    """Return the absolute path of an adapter's folder on this Mac."""
    return Path(written).expanduser().absolute()


def _read_base_shape(folder: Path, order: LoadOrder, possible_ranks: Collection[int] = ()) -> ModelShape:
    return read_shape(
        folder,
        order.model,
        order.max_context,
        kv_bits=order.kv_bits,
        weight_bits=order.quantize,
        prefill_chunk=order.prefill_chunk,
        default_context=order.default_context,
        ranks=frozenset(map(len, order.groups)),
        possible_ranks={*possible_ranks, *list_sizes(order.insecure_links)},
    )
