"""GET /metrics of a coordinator that stands by: about itself, so that nobody takes its leader for two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio.to_thread
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.errors import HANDLERS
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.key_usage import KeyUsage
from cluster.api.metrics import ProcessMetrics, standby_exposition
from cluster.core.leadership import FollowingState
from cluster.security.keys import KeyStore

METRICS: Final = "/metrics"


def standby_metrics(
    state: Callable[[], FollowingState], process: ProcessMetrics, keys: KeyStore | None, origins: OriginPolicy
) -> RequestMiddleware:
    """Return the application that answers ``METRICS``. Requests need an API key for it if there are ``keys``."""

    async def metrics(request: Request) -> Response:
        of_process = await anyio.to_thread.run_sync(process.exposition)
        return Response(standby_exposition(state()) + of_process, media_type=CONTENT_TYPE_LATEST)

    routes = [DeclaredRoute(METRICS, metrics, access=Access.ADMIN, methods=["GET", "HEAD"])]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    return RequestMiddleware(app, lambda *_: None, Authorizer(routes, KeyUsage(keys) if keys else None), origins)
