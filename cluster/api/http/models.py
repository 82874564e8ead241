"""GET /v1/models and /v1/models/{id}: the models under each of their names, in OpenAI's and Anthropic's format."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from cluster.api.http.json_response import Json
from cluster.api.http.model_names import ModelNames
from cluster.coordinator.model_catalog import public_id
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import ModelNotFound, NotServing


@dataclass(frozen=True, slots=True)
class Models:
    """The handlers of both routes. ``created`` is the coordinator's start in Unix seconds: a model has no date."""

    names: ModelNames
    created: int = field(default_factory=lambda: int(time.time()))

    async def list_models(self, request: Request) -> Json:
        """Return the list of models, loaded or not; of a single model, only while it is served."""
        listed = [self._model(name, info) for info in self.names.loaded() for name in self.names.public_names(info)]
        listed += [self._describe(name) for name in self.names.unloaded()]
        return Json(_page(listed))

    async def get_model(self, request: Request) -> Json:
        """Return the model with one of its names. Raises ``ModelNotFound``."""
        name = request.path_params["model"]
        try:
            model_info = self.names.resolve(name)
        except NotServing as e:
            if shown := self.names.unloaded_name(name):
                context = await self.names.read_context(shown)
                return Json({**self._describe(shown), **(_lengths(context) if context else {})})
            raise ModelNotFound(f"the model {name[:64]} is not served here: {e.sentence}", field="model") from None
        return Json(self._model(self.names.shown_name(name, model_info), model_info))

    def _model(self, name: str, model_info: ModelInfo) -> dict[str, Any]:
        shape = model_info.shape
        parent = {"parent": self.names.id_of(model_info)} if self.names.resolve(name).adapter else {}
        return {
            **self._describe(name, loaded=True),
            **_lengths(shape.max_context),
            "root": public_id(shape.model.name, shape.model.path),
            "layers": shape.layers,
            **parent,
        }

    def _describe(self, name: str, *, loaded: bool = False) -> dict[str, Any]:
        """Return what is known of a model that may not be loaded."""
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "created": self.created,
            "created_at": datetime.fromtimestamp(self.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "owned_by": "macpipe",
            "loaded": loaded,
        }


def _lengths(context: int) -> dict[str, int]:
    return {"context_length": context, "max_model_len": context}


def _page(data: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a page with all models; there is never a second page."""
    ids = [model["id"] for model in data] or [None]
    return {"object": "list", "data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}
