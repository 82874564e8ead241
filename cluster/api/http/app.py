"""The HTTP application: its routes, their access levels and their handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Any, Final

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from cluster.api.background_load import BackgroundLoad
from cluster.api.cluster_feed import ClusterFeed
from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute, PageRoute
from cluster.api.http.browser_sessions import BrowserSessions
from cluster.api.http.chat import Chat
from cluster.api.http.completions import Completions
from cluster.api.http.embeddings import EmbeddingRoutes
from cluster.api.http.errors import HANDLERS
from cluster.api.http.health import Health, answer_live
from cluster.api.http.json_response import Json
from cluster.api.http.live import Live
from cluster.api.http.login import Login
from cluster.api.http.messages import Messages
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.model_names import ModelNames
from cluster.api.http.models import Models
from cluster.api.http.ollama import Ollama
from cluster.api.http.ollama_models import INSTEAD, OllamaModels
from cluster.api.http.openapi import description
from cluster.api.http.operations import Operations
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.page_files import PageFiles, wants_page
from cluster.api.http.responses import Responses
from cluster.api.http.sse import EventStream
from cluster.api.http.tokenize import Tokenize
from cluster.api.request_service import RequestService
from cluster.coordinator.present_plans import PresentPlans
from cluster.coordinator.settings import LoadOrder

Endpoint = Callable[[Request], Awaitable[Response | EventStream[Any]]]
UNKNOWN: Final = "unknown"
_PATTERNS: Final = (("/v1/models/", "/v1/models/{model}"), ("/page/", "/page/{name}"))
"""Paths that begin so are counted as one route."""


def application(
    service: RequestService,
    origin_policy: OriginPolicy | None = None,
    loads: BackgroundLoad | None = None,
    feed: ClusterFeed | None = None,
    first: LoadOrder | None = None,
) -> RequestMiddleware:
    """Return the HTTP application of one coordinator.

    Requests need an API key if ``service`` knows keys. ``loads`` runs the loads that people begin on the page, with the
    settings of ``first``, and ``feed`` tells them what happens.
    """
    sessions = BrowserSessions(service.key_usage) if service.key_usage else None
    loads = loads or BackgroundLoad(service.coordinator)
    plans = PresentPlans(service.coordinator, service.on_demand)
    operations = Operations(service.coordinator, plans, loads, first or LoadOrder(""))
    page = page_table(service, operations, feed or ClusterFeed(), sessions)
    routes = [*table(service), *page]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    known = frozenset(route.path for route in routes)

    def observe(method: str, path: str, status: int, seconds: float) -> None:
        route = path if path in known else next((r for p, r in _PATTERNS if path.startswith(p)), UNKNOWN)
        service.metrics.count_response(route, status)

    authorizer = Authorizer(app.routes, service.key_usage, sessions)
    return RequestMiddleware(app, observe, authorizer, origin_policy, service.bodies, strict=service.strict)


def table(service: RequestService) -> list[DeclaredRoute]:
    """Return the routes of the API, each with the access level that it needs in a cluster."""
    names = ModelNames(service.coordinator, service.on_demand)
    health, models, tokenize = Health(service, names), Models(names), Tokenize(names)

    async def openapi(request: Request) -> Response:
        return Json(await anyio.to_thread.run_sync(description))  # not before: a new leader has to answer at once

    return [
        *_get("/health", health.ready, Access.ANYONE),
        *_get("/ready", health.ready, Access.ANYONE),
        *_get("/live", answer_live, Access.ANYONE),
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
        *_post("/v1/embeddings", EmbeddingRoutes(service, names).openai),
        *_post("/tokenize", tokenize.tokens),
        *ollama_table(service, names),
    ]


def ollama_table(service: RequestService, names: ModelNames) -> list[DeclaredRoute]:
    """Return the routes of Ollama's API."""
    ollama, models, embeddings = Ollama(service, names), OllamaModels(names), EmbeddingRoutes(service, names)
    refused = [
        _routes(path, models.refuse, ("DELETE",) if path == "/api/delete" else ("POST",), Access.INFERENCE)
        for path in INSTEAD
    ]
    return [
        *_post("/api/chat", ollama.chat),
        *_post("/api/generate", ollama.generate),
        *_post("/api/embed", embeddings.ollama),
        *_post("/api/embeddings", embeddings.ollama_single),
        *_post("/api/show", models.show),
        *_get("/api/tags", models.tags),
        *_get("/api/ps", models.running),
        *_get("/api/version", models.version),
        *chain.from_iterable(refused),
    ]


def page_table(
    service: RequestService,
    operations: Operations,
    feed: ClusterFeed,
    sessions: BrowserSessions | None,
) -> list[DeclaredRoute]:
    """Return the routes of the page. Its files are for anyone; what it shows and does needs a session or a key."""
    names = ModelNames(service.coordinator, service.on_demand)
    files, health, login = PageFiles(), Health(service, names), Login(service.key_usage, sessions)
    live = Live(service, names, operations.loads, feed, sessions)

    async def root(request: Request) -> Response:
        return files.index(request) if wants_page(request) else await health.root(request)

    return [
        *_get("/", root, Access.ANYONE),
        *_get("/page/{name}", files.get, Access.ANYONE),
        _page_route("/api/session", {"GET": login.show, "POST": login.sign_in, "DELETE": login.sign_out}),
        _page_route("/api/events", {"GET": live}, Access.INFERENCE),
        _page_route("/api/answer", {"POST": Chat(service, names)}, Access.INFERENCE, counted=True),
        _page_route("/api/plan", {"POST": operations.plan}, Access.ADMIN),
        _page_route("/api/plans", {"POST": operations.plan_models}, Access.ADMIN),
        _page_route("/api/load", {"POST": operations.load}, Access.ADMIN),
        _page_route("/api/unload", {"POST": operations.unload}, Access.ADMIN),
    ]


def _page_route(
    path: str, handlers: Mapping[str, Endpoint], access: Access = Access.ANYONE, *, counted: bool = False
) -> DeclaredRoute:
    async def endpoint(request: Request) -> Response | EventStream[Any]:
        return await handlers[request.method](request)

    return PageRoute(path, endpoint, access=access, methods=list(handlers), counted=counted)


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
