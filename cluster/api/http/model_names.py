"""The names of the loaded models: a public one, aliases, and each of them with a colon and an adapter's name."""

from __future__ import annotations

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.adapter import join_model_name


class ModelNames:
    """What clients may ask for over HTTP, and what they are told in answers."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def resolve(self, requested: str | None) -> ModelInfo:
        """Return the loaded model that ``requested`` names, with an adapter if it names one; None: the default model.

        Raises ``NotServing``, and ``ModelNotFound`` if there is no such model or adapter.
        """
        return self._coordinator.served_model(requested or "")

    def loaded(self) -> list[ModelInfo]:
        """Return the models that are loaded, the default one first if it is."""
        return self._coordinator.loaded_models()

    def unloaded(self) -> list[str]:
        """Return the public names of the models that are not loaded, if there is more than one model."""
        return self._coordinator.unloaded_names()

    def public_names(self, model_info: ModelInfo) -> tuple[str, ...]:
        """Return the model's public names, its id first, and then those with each of its adapters."""
        base = self._coordinator.names_of(model_info)
        return (*base, *(join_model_name(name, a.ref.name) for a in model_info.adapters.served for name in base))

    def shown_name(self, requested: str | None, model_info: ModelInfo) -> str:
        """Return the model name for a response: the requested name if it is public, else the id."""
        if requested and requested in self.public_names(model_info):
            return requested
        adapter = model_info.adapter
        return join_model_name(self.id_of(model_info), adapter.ref.name if adapter else "")

    def id_of(self, model_info: ModelInfo) -> str:
        """Return the model's first public name."""
        return self._coordinator.names_of(model_info)[0]
