"""The HTTP application: its routes, their access levels and their handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.chat import Chat
from cluster.api.http.completions import Completions
from cluster.api.http.errors import HANDLERS
from cluster.api.http.health import Health
from cluster.api.http.json_response import Json
from cluster.api.http.messages import Messages
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.model_names import ModelNames
from cluster.api.http.models import Models
from cluster.api.http.openapi import description
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.responses import Responses
from cluster.api.http.sse import EventStream
from cluster.api.http.tokenize import Tokenize
from cluster.api.request_service import RequestService

Endpoint = Callable[[Request], Awaitable[Response | EventStream[Any]]]
UNKNOWN: Final = "unknown"


def application(
    service: RequestService, aliases: tuple[str, ...] = (), origin_policy: OriginPolicy | None = None
) -> ASGIApp:
    """Return the HTTP application of one coordinator; ``aliases`` are further names of the served model.

    Requests need an API key if ``service`` knows keys.
    """
    routes = table(service, aliases)
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    known = frozenset(route.path for route in routes)

    def observe(method: str, path: str, status: int, seconds: float) -> None:
        route = path if path in known else "/v1/models/{model}" if path.startswith("/v1/models/") else UNKNOWN
        service.metrics.count_response(route, status)

    authorizer = Authorizer(app.routes, service.key_usage)
    return RequestMiddleware(app, observe, authorizer, origin_policy, service.bodies, strict=service.strict)


def table(service: RequestService, aliases: tuple[str, ...] = ()) -> list[DeclaredRoute]:
    """Return all routes, each with the access level that it needs in a cluster."""
    names = ModelNames(service.coordinator, aliases)
    health, models, tokenize = Health(service, names), Models(names), Tokenize(names)
    document = description()

    async def openapi(request: Request) -> Response:
        return Json(document)

    return [
        *_get("/", health.root),
        *_get("/health", health.ready, Access.ANYONE),
        *_get("/ready", health.ready, Access.ANYONE),
        *_get("/live", health.live, Access.ANYONE),
        *_get("/api/hello", health.hello, Access.ANYONE),
        *_get("/metrics", health.metrics, Access.ADMIN),
        *_get("/openapi.json", openapi),
        *_get("/v1/models", models.list_models),
        *_get("/v1/models/{model:path}", models.get_model),
        *_post("/v1/chat/completions", Chat(service, names)),
        *_post("/v1/completions", Completions(service, names)),
        *_post("/v1/responses", Responses(service, names)),
        *_post("/v1/messages", Messages(service, names)),
        *_post("/v1/messages/count_tokens", tokenize.count),
        *_post("/tokenize", tokenize.tokens),
    ]


def _get(path: str, answer: Endpoint, access: Access = Access.INFERENCE) -> list[DeclaredRoute]:
    """Return a route for GET, HEAD and OPTIONS."""
    return _routes(path, answer, ("GET", "HEAD"), access)


def _post(path: str, answer: Endpoint) -> list[DeclaredRoute]:
    return _routes(path, answer, ("POST",), Access.INFERENCE)


def _routes(path: str, answer: Endpoint, methods: tuple[str, ...], access: Access) -> list[DeclaredRoute]:
    allow = ", ".join((*methods, "OPTIONS"))

    async def endpoint(request: Request) -> Response | EventStream[Any]:
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allow})
        return await answer(request)

    return [DeclaredRoute(path, endpoint, access=access, methods=[*methods, "OPTIONS"])]
