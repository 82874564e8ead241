"""By which names a client may call the served model: its id, what people named it, ``default``, or nothing."""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import ModelNotFound

DEFAULT: Final = "default"


class ModelNames:
    """``aliases`` are further names of whatever is served."""

    def __init__(self, coordinator: Coordinator, aliases: tuple[str, ...] = ()) -> None:
        self._coordinator, self._aliases = coordinator, aliases

    def checkpoint(self, asked: str | None) -> ModelInfo:
        """The served model. Raises ``NotServing``, and ``ModelNotFound`` where another is meant."""
        checkpoint = self._coordinator.checkpoint("")
        known = (*self.of(checkpoint), checkpoint.shape.model.name, DEFAULT, "", None)
        if asked not in known:
            listed = ", ".join(self.of(checkpoint))
            raise ModelNotFound(f"no model {str(asked)[:64]} is served here; there is {listed}", field="model")
        return checkpoint

    def of(self, checkpoint: ModelInfo) -> tuple[str, ...]:
        """Its names for clients, the id first. A folder's id is its last part: its place is nobody else's business."""
        return tuple(dict.fromkeys((model_id(checkpoint), *self._aliases)))

    def shown_name(self, asked: str | None, checkpoint: ModelInfo) -> str:
        """What an answer says that it is from: the name that was asked for, where it is one of those listed."""
        return asked if asked and asked in self.of(checkpoint) else model_id(checkpoint)


def model_id(checkpoint: ModelInfo) -> str:
    """A Hugging Face id or bundled name as it is; a folder's last part."""
    name = checkpoint.shape.model.name
    return PurePath(name).name if name.startswith(("/", ".", "~")) else name
