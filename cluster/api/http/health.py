"""GET /, /health, /ready, /live and /metrics: whether a token can pass through every stage, and current metrics.

It asks no worker, only the coordinator, so that probes cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from cluster import __version__
from cluster.api.http.authorization import TRUSTED
from cluster.api.http.json_response import Json
from cluster.api.http.model_names import ModelNames
from cluster.api.request_service import RequestService
from cluster.coordinator.deployment_states import describe_deployments
from cluster.core.cluster_state import ServingState
from cluster.core.errors import MacpipeError
from cluster.core.limits import UNAVAILABLE_S


@dataclass(frozen=True, slots=True)
class Health:
    """The routes' handlers."""

    service: RequestService
    names: ModelNames

    async def ready(self, request: Request) -> Json:
        """Return 200 while a token can pass through every stage of the default model, else 503 and the reason.

        Also return 200 while that model is not loaded, if a request would load it. Callers without a valid key get the
        status only.
        """
        state = self.service.coordinator.default_state
        ready = state is ServingState.SERVING or (state is ServingState.IDLE and self.names.would_load(None))
        if not request.scope.get(TRUSTED):
            return _ready(ready, {"status": state.value if ready else "not serving"})
        facts: dict[str, Any] = {"status": state.value, "version": __version__}
        try:
            model_info = self.names.resolve(None)
        except MacpipeError as e:
            facts["message"] = e.sentence
            if ready:
                facts["model"] = name = self.names.unloaded_name(None)
                facts["message"] = f"the model {name} is not loaded; a request loads it"
        else:
            facts |= {"model": self.names.id_of(model_info), "context_length": model_info.shape.max_context}
        return _ready(ready, facts)

    async def hello(self, request: Request) -> Response:
        """Return 200 without content: Claude Code asks whether the address answers."""
        return Response()

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        coordinator = self.service.coordinator
        plan, loop = await coordinator.plan_and_view()
        text = self.service.metrics.exposition(
            coordinator.state,
            plan,
            loop,
            coordinator.journal,
            coordinator.known_workers(),
            coordinator.totals,
            await describe_deployments(coordinator.deployments),
            coordinator.leadership(),
        )
        of_process = await anyio.to_thread.run_sync(self.service.metrics.process.exposition)
        return Response(text + of_process, media_type=CONTENT_TYPE_LATEST)

    async def root(self, request: Request) -> Response:
        """Return a short text for clients that probe the address first."""
        trusted = request.scope.get(TRUSTED)
        state = f" {__version__}: {self.service.coordinator.state.value}" if trusted else ""
        return Response(
            f"macpipe{state}.\n"
            "The base URL is /v1 for OpenAI clients, this address for Anthropic and Ollama clients. "
            "See /health, /v1/models, /openapi.json. A browser shows the page of this cluster here.\n",
            media_type="text/plain",
        )


async def answer_live(request: Request) -> Json:
    """Return 200 as long as this process answers."""
    return Json({"status": "live", **({"version": __version__} if request.scope.get(TRUSTED) else {})})


def _ready(ready: bool, facts: dict[str, Any]) -> Json:
    return Json(facts, 200 if ready else 503, None if ready else {"retry-after": f"{UNAVAILABLE_S:.0f}"})
