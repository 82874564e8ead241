"""The names under which clients may request the served model: its id, its aliases, ``default``, or no name.

A name with a colon and an adapter's name asks for the model with that adapter.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo, choose_adapter
from cluster.core.adapter import join_model_name, split_model_name
from cluster.core.errors import ModelNotFound

DEFAULT: Final = "default"


class ModelNames:
    """The names of the served model; ``aliases`` are additional ones."""

    def __init__(self, coordinator: Coordinator, aliases: tuple[str, ...] = ()) -> None:
        self._coordinator = coordinator
        self._aliases = aliases

    def resolve(self, requested: str | None) -> ModelInfo:
        """Return the served model, with the adapter that ``requested`` names, if any.

        Raises ``NotServing``, and ``ModelNotFound`` if ``requested`` is another model or adapter.
        """
        model_info = self._coordinator.served_model("")
        name = model_info.shape.model.name
        known = (*self._base_names(model_info), name, PurePath(name).name, DEFAULT, "", None)
        if requested in known:
            return model_info
        base, adapter = split_model_name(str(requested))
        if base and base in known and model_info.adapters.find(adapter):
            return choose_adapter(model_info, adapter)
        listed = ", ".join(self.public_names(model_info))
        raise ModelNotFound(f"the model {str(requested)[:64]} is not served here; use {listed}", field="model")

    def public_names(self, model_info: ModelInfo) -> tuple[str, ...]:
        """Return the model's public names, its id first, and then those with each of its adapters."""
        base = self._base_names(model_info)
        return (*base, *(join_model_name(name, a.ref.name) for a in model_info.adapters.served for name in base))

    def _base_names(self, model_info: ModelInfo) -> tuple[str, ...]:
        return tuple(dict.fromkeys((model_id(model_info), *self._aliases)))

    def shown_name(self, requested: str | None, model_info: ModelInfo) -> str:
        """Return the model name for a response: the requested name if it is public, else the id."""
        if requested and requested in self.public_names(model_info):
            return requested
        adapter = model_info.adapter
        return join_model_name(model_id(model_info), adapter.ref.name if adapter else "")


def model_id(model_info: ModelInfo) -> str:
    """Return the public id: a Hugging Face id or bundled name unchanged, a folder's last part (its path is private)."""
    model = model_info.shape.model
    name = PurePath(model.name)
    is_folder = model.name.startswith(("/", ".", "~")) or PurePath(model.path).parts[-len(name.parts) :] == name.parts
    return name.name if is_folder else model.name
