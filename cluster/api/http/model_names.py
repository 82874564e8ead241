"""The names of the loaded models: a public one, aliases, and each of them with a colon and an adapter's name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_host import HeldModel
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import ModelEntry
from cluster.core.adapter import join_model_name
from cluster.core.errors import ModelNotFound, NotServing


class ModelNames:
    """What clients may ask for over HTTP, and what they are told in answers.

    ``on_demand`` loads models when they are asked for; None if only people load models.
    """

    def __init__(self, coordinator: Coordinator, on_demand: OnDemand | None = None) -> None:
        self._coordinator, self._on_demand = coordinator, on_demand

    def resolve(self, requested: str | None) -> ModelInfo:
        """Return the loaded model that ``requested`` names, with an adapter if it names one; None: the default model.

        Raises ``NotServing``, and ``ModelNotFound`` if there is no such model or adapter.
        """
        return self._coordinator.served_model(requested or "")

    def loaded(self) -> list[ModelInfo]:
        """Return the models that are loaded, the default one first if it is."""
        return self._coordinator.deployments.loaded_models()

    def unloaded(self) -> list[str]:
        """Return the public names of the models that are not loaded, if there is more than one model."""
        return self._coordinator.deployments.unloaded_names()

    def unloaded_name(self, requested: str | None) -> str:
        """Return the name under which a model that is not loaded is shown; "" if no request loads models.

        Raises ``ModelNotFound``.
        """
        if requested in self.unloaded():
            return requested or ""
        if self._on_demand is None or not self._on_demand.enabled:
            return ""
        entry, adapter = self._coordinator.catalog.resolve(requested)
        return join_model_name(self._coordinator.catalog.public_name(entry), adapter)

    async def read_context(self, requested: str) -> int:
        """Return how many tokens of context a model will have once it is loaded; 0 if that is not known.

        Raises ``ModelNotFound``.
        """
        return await self._on_demand.contexts.read(requested) if self._on_demand else 0

    @property
    def load_wait_s(self) -> float:
        """How long a request waits for its model if nothing can be sent meanwhile."""
        return self._on_demand.load_wait_s if self._on_demand else 0.0

    def is_known(self, requested: str) -> bool:
        """Return whether a model has this name, loaded or not, and the adapter that it names, if any."""
        try:
            self.resolve(requested)
        except ModelNotFound:
            return False
        except NotServing:
            entry, adapter = self._coordinator.catalog.resolve(requested)
            return not adapter or adapter in dict(entry.order.adapters)
        return True

    def is_ready(self, requested: str | None) -> bool:
        """Return whether a request need not wait for its model.

        Raises ``ModelNotFound``, and ``NotServing`` if a model that is not loaded is not waited for.
        """
        if self._on_demand:
            return self._on_demand.is_ready(requested)
        self.resolve(requested)
        return True

    def would_load(self, requested: str | None) -> bool:
        """Return whether a model is not loaded, and a request would load it now. Raises ``ModelNotFound``."""
        return self._on_demand is not None and self._on_demand.would_load(requested)

    async def await_ready(self, requested: str | None, seconds: float) -> bool:
        """Return whether a request need not wait for its model, or not any more after so many seconds."""
        return self._on_demand is None or await self._on_demand.await_ready(requested, seconds)

    @asynccontextmanager
    async def hold(self, requested: str | None, wait_s: float | None = None) -> AsyncIterator[HeldModel]:
        """Keep a model loaded within the block. Load it first if it may be loaded on demand, see ``OnDemand.hold``.

        Raises as ``resolve``, and the error of the load.
        """
        if self._on_demand is None:
            yield HeldModel(self.resolve(requested))
            return
        async with self._on_demand.hold(requested, wait_s=wait_s) as held:
            yield held

    @asynccontextmanager
    async def hold_tokenizer(self, requested: str | None) -> AsyncIterator[ModelInfo]:
        """Keep a model's tokenizer within the block, without loading the model. Raises as ``hold``."""
        if self._on_demand is None:
            yield self.resolve(requested)
            return
        async with self._on_demand.hold_tokenizer(requested) as model_info:
            yield model_info

    def requested_name(self, requested: str | None) -> str:
        """Return the name for a response that begins before its model is known. Raises as ``is_ready``."""
        if self.is_ready(requested):
            return self.shown_name(requested, self.resolve(requested))
        entry, adapter = self._coordinator.catalog.resolve(requested)
        return join_model_name(self._coordinator.catalog.public_name(entry), adapter)

    def public_names(self, model_info: ModelInfo) -> tuple[str, ...]:
        """Return the model's public names, its id first, and then those with each of its adapters."""
        base = self._coordinator.deployments.names_of(model_info)
        return (*base, *(join_model_name(name, a.ref.name) for a in model_info.adapters.served for name in base))

    def shown_name(self, requested: str | None, model_info: ModelInfo) -> str:
        """Return the model name for a response: the requested name if it is public, else the id."""
        if requested and requested in self.public_names(model_info):
            return requested
        adapter = model_info.adapter
        return join_model_name(self.id_of(model_info), adapter.ref.name if adapter else "")

    def id_of(self, model_info: ModelInfo) -> str:
        """Return the model's first public name."""
        return self._coordinator.deployments.names_of(model_info)[0]

    def entry_of(self, model_info: ModelInfo) -> ModelEntry | None:
        """Return what is configured of a loaded model; None if nothing is."""
        try:
            return self._coordinator.catalog.resolve(self.id_of(model_info))[0]
        except ModelNotFound:
            return None

    def idle_left_s(self, entry: ModelEntry | None) -> float | None:
        """Return in how many seconds a loaded model is unloaded if nobody uses it until then; None if it stays."""
        return self._on_demand.idle_left_s(entry) if self._on_demand and entry else None
