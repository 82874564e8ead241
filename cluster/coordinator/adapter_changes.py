"""Add adapters to a served model and remove them while requests run.

The stages are told the whole set each time. A recovery or a move loads the same set on its own, so a change that meets
one of them is refused, or fails and can be repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import anyio

from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.epoch import Epoch, EpochBuilder
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.settings import LoadOrder
from cluster.core.adapter import Adapter, stage_bytes
from cluster.core.errors import Busy, DoesNotFit, InvalidOption, MacpipeError, NotServing
from cluster.core.limits import CONTROL_TIMEOUT_S, GIB, RETRY_AFTER_S
from cluster.core.plan import Plan, PlannedStage

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class AdapterChanges:
    """Changes the adapters of ``model_info`` on all of its rings, one change at a time.

    ``rings`` returns those that serve the model now.
    """

    def __init__(self, model_info: ModelInfo, rings: Callable[[], Sequence[RingAdapters]]) -> None:
        self._model_info, self._rings = model_info, rings
        self._changing = asyncio.Lock()

    async def add(self, adapter: Adapter) -> Adapter:
        """Load an adapter on all stages of all rings and serve it. Return it.

        Raises ``InvalidOption`` for a name that is taken, ``DoesNotFit``, ``Busy`` if live requests need its memory,
        ``NotServing`` during a recovery or a move, and the errors of the workers. Nothing has changed then.
        """
        async with self._changing:
            rings = self._rings()
            epochs = [ring.require_steady() for ring in rings]
            self._model_info.adapters.load(adapter)
            try:
                for ring, epoch in zip(rings, epochs, strict=True):
                    await ring.load(epoch, adapter.ref.name)
                if self._rings() != rings or any(r.epoch is not e for r, e in zip(rings, epochs, strict=True)):
                    raise _moving_error()
            except BaseException:
                self._model_info.adapters.remove(adapter.ref.name)
                with anyio.move_on_after(CONTROL_TIMEOUT_S, shield=True):
                    for ring, epoch in zip(rings, epochs, strict=True):
                        await ring.free(epoch, adapter.ref.name)
                raise
            self._model_info.adapters.serve(adapter)
        return adapter

    async def remove(self, name: str) -> int:
        """Remove an adapter, and end its live requests. Return how many. Raises ``ModelNotFound``.

        A worker that cannot be told keeps the adapter's memory until its adapters are set again.
        """
        async with self._changing:
            removed = self._model_info.adapters.remove(name)
            ended = [await ring.end(removed) for ring in self._rings()]
            for ring in self._rings():
                if epoch := ring.epoch:
                    await ring.free(epoch, name)
            return sum(ended)


class RingAdapters:
    """The adapters of ``model_info`` on one ring.

    ``steady_epoch`` returns the epoch that serves; None while another one is being opened.
    """

    def __init__(
        self, model_info: ModelInfo, loop: EngineLoop, builder: EpochBuilder, steady_epoch: Callable[[], Epoch | None]
    ) -> None:
        self._model_info, self._loop, self._builder = model_info, loop, builder
        self._steady_epoch = steady_epoch

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that serves; None while another one is being opened."""
        return self._steady_epoch()

    def require_steady(self) -> Epoch:
        """Return ``epoch``. Raises ``NotServing`` during a recovery or a move."""
        epoch = self.epoch
        if epoch is None:
            raise _moving_error()
        return epoch

    async def load(self, epoch: Epoch, name: str) -> None:
        """Load an adapter, which ``model_info`` has already, on all stages. Raises as ``AdapterChanges.add``."""
        await self._take_memory(epoch, name)
        await self._builder.set_adapters(epoch.plan, epoch.workers)

    async def end(self, adapter: Adapter) -> int:
        """End the live requests of an adapter that was removed. Return how many. Raises ``NotServing``."""
        error = NotServing(f"the adapter {adapter.ref.name} was removed")
        return await _wait_for_loop(self._loop.end_adapter(adapter.key, error))

    async def free(self, epoch: Epoch, name: str) -> None:
        """Have the workers drop an adapter that was removed, and give its memory back to the caches."""
        try:
            await self._builder.set_adapters(epoch.plan, epoch.workers)
        except MacpipeError as e:
            log.warning("adapters: not removed everywhere reason=%s adapter=%s", e.sentence, name)
        finally:
            self._loop.take_adapter_memory(epoch.plan.epoch, self._count_extra_bytes(epoch))

    def adjust_order(self, order: LoadOrder) -> LoadOrder:
        """Return an order of the same model with the adapters that are served now."""
        served = self._model_info.adapters.served
        return replace(order, adapters=tuple((adapter.ref.name, adapter.ref.path) for adapter in served))

    def adjust(self, plan: Plan) -> Plan:
        """Return a plan whose sizes count the adapters that are loaded now."""
        return replace(plan, stages=tuple(map(self._adjust_stage, plan.stages)))

    def _adjust_stage(self, stage: PlannedStage) -> PlannedStage:
        more = self._more_bytes(stage)
        return replace(stage, weight_bytes=stage.weight_bytes + more, cache_bytes=stage.cache_bytes - more)

    async def _take_memory(self, epoch: Epoch, name: str) -> None:
        if epoch.plan.is_grouped:
            raise InvalidOption("a model whose layers are shared by a group of Macs cannot have adapters", field="name")
        shape, taken = self._model_info.shape, self._count_extra_bytes(epoch)
        for stage, more in zip(epoch.plan.stages, taken, strict=True):
            if stage.cache_bytes - more < shape.stage_cache_bytes(stage.layers):
                raise DoesNotFit(
                    f"the adapter {name} does not fit: worker {stage.worker} has {stage.cache_bytes / GIB:.3g} GiB for "
                    f"caches and adapters, of which a context of {shape.max_context} tokens needs "
                    f"{shape.stage_cache_bytes(stage.layers) / GIB:.3g} GiB and the adapters would need "
                    f"{more / GIB:.3g} GiB; remove another adapter, or load the model with a smaller --max-context",
                    worker=stage.worker,
                )
        if not await _wait_for_loop(self._loop.take_adapter_memory(epoch.plan.epoch, taken)):
            raise Busy(
                f"the live requests need the memory that the adapter {name} would take; add it once they have ended",
                retry_after_s=RETRY_AFTER_S,
            )

    def _count_extra_bytes(self, epoch: Epoch) -> tuple[int, ...]:
        """Return the bytes per stage of the loaded adapters beyond those that the epoch's plan counts."""
        return tuple(map(self._more_bytes, epoch.plan.stages))

    def _more_bytes(self, stage: PlannedStage) -> int:
        whole = self._model_info.shape.of_rank(stage.spec.ranks)
        counted = stage.weight_bytes - whole.stage_bytes(stage.layers)
        return stage_bytes(self._model_info.adapters.loaded, stage.layers) - counted


async def _wait_for_loop(asked: Future[Result]) -> Result:
    """Return the engine loop's answer. Raises ``NotServing`` if the loop has ended, or does not answer in time."""
    try:
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            return await asyncio.wrap_future(asked)
    except TimeoutError:
        raise NotServing("the engine loop is stuck; load the model again") from None


def _moving_error() -> NotServing:
    return NotServing(
        "layers are moving to other Macs; change the adapters once that is done", retry_after_s=RETRY_AFTER_S
    )
