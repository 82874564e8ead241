"""GET /v1/models and /v1/models/{id}: what is served, under each of its names."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from cluster.api.http.jsons import Json
from cluster.api.http.names import Names, model_id
from cluster.coordinator.checkpoint import Checkpoint
from cluster.errors import MacpipeError, ModelNotFound, NotServing


@dataclass(frozen=True, slots=True)
class Models:
    """The two routes. ``created`` is when this coordinator started: a model has no date of its own."""

    names: Names
    created: int = field(default_factory=lambda: int(time.time()))

    async def all(self, request: Request) -> Json:
        """The list; empty while nothing is served."""
        try:
            checkpoint = self.names.checkpoint(None)
        except MacpipeError:
            return Json({"object": "list", "data": []})
        data = [self._model(name, checkpoint) for name in self.names.of(checkpoint)]
        return Json({"object": "list", "data": data})

    async def one(self, request: Request) -> Json:
        """One by any of its names. Raises ``ModelNotFound``."""
        asked = request.path_params["model"]
        try:
            checkpoint = self.names.checkpoint(asked)
        except NotServing as e:
            raise ModelNotFound(f"no model {asked} is served here: {e.sentence}", field="model") from None
        return Json(self._model(self.names.shown(asked, checkpoint), checkpoint))

    def _model(self, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
        shape = checkpoint.shape
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "macpipe",
            "context_length": shape.max_context,
            "max_model_len": shape.max_context,
            "root": model_id(checkpoint),
            "layers": shape.layers,
        }
