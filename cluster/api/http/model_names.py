"""The names under which clients may request the served model: its id, its aliases, ``default``, or no name."""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import ModelNotFound

DEFAULT: Final = "default"


class ModelNames:
    """The names of the served model; ``aliases`` are additional ones."""

    def __init__(self, coordinator: Coordinator, aliases: tuple[str, ...] = ()) -> None:
        self._coordinator = coordinator
        self._aliases = aliases

    def resolve(self, requested: str | None) -> ModelInfo:
        """Return the served model. Raises ``NotServing``, and ``ModelNotFound`` if ``requested`` is another model."""
        model_info = self._coordinator.served_model("")
        name = model_info.shape.model.name
        known = (*self.public_names(model_info), name, PurePath(name).name, DEFAULT, "", None)
        if requested not in known:
            listed = ", ".join(self.public_names(model_info))
            raise ModelNotFound(f"the model {str(requested)[:64]} is not served here; use {listed}", field="model")
        return model_info

    def public_names(self, model_info: ModelInfo) -> tuple[str, ...]:
        """Return the model's public names, its id first."""
        return tuple(dict.fromkeys((model_id(model_info), *self._aliases)))

    def shown_name(self, requested: str | None, model_info: ModelInfo) -> str:
        """Return the model name for a response: the requested name if it is public, else the id."""
        return requested if requested and requested in self.public_names(model_info) else model_id(model_info)


def model_id(model_info: ModelInfo) -> str:
    """Return the public id: a Hugging Face id or bundled name unchanged, a folder's last part (its path is private)."""
    model = model_info.shape.model
    name = PurePath(model.name)
    is_folder = model.name.startswith(("/", ".", "~")) or PurePath(model.path).parts[-len(name.parts) :] == name.parts
    return name.name if is_folder else model.name
