"""GET /v1/models and /v1/models/{id}: the served model under each of its names, in OpenAI's and Anthropic's format."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from cluster.api.http.json_response import Json
from cluster.api.http.model_names import ModelNames, model_id
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import MacpipeError, ModelNotFound, NotServing


@dataclass(frozen=True, slots=True)
class Models:
    """The handlers of both routes. ``created`` is the coordinator's start in Unix seconds: a model has no date."""

    names: ModelNames
    created: int = field(default_factory=lambda: int(time.time()))

    async def list_models(self, request: Request) -> Json:
        """Return the list of models; empty while nothing is served."""
        try:
            model_info = self.names.resolve(None)
        except MacpipeError:
            return Json(_page([]))
        return Json(_page([self._model(name, model_info) for name in self.names.public_names(model_info)]))

    async def get_model(self, request: Request) -> Json:
        """Return the model with one of its names. Raises ``ModelNotFound``."""
        name = request.path_params["model"]
        try:
            model_info = self.names.resolve(name)
        except NotServing as e:
            raise ModelNotFound(f"the model {name[:64]} is not served here: {e.sentence}", field="model") from None
        return Json(self._model(self.names.shown_name(name, model_info), model_info))

    def _model(self, name: str, model_info: ModelInfo) -> dict[str, Any]:
        shape, base = model_info.shape, model_id(model_info)
        parent = {"parent": base} if self.names.resolve(name).adapter else {}
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "created": self.created,
            "created_at": datetime.fromtimestamp(self.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "owned_by": "macpipe",
            "context_length": shape.max_context,
            "max_model_len": shape.max_context,
            "root": base,
            "layers": shape.layers,
            **parent,
        }


def _page(data: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a page with all models; there is never a second page."""
    ids = [model["id"] for model in data] or [None]
    return {"object": "list", "data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}
