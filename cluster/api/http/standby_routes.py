"""What a coordinator that stands by answers itself at its HTTP port, since it is about its own process.

GET /metrics: so that nobody takes its leader for two. GET /live: a standby lives, whether anybody leads or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import anyio.to_thread
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.errors import HANDLERS
from cluster.api.http.health import answer_live
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.key_usage import KeyUsage
from cluster.api.metrics import ProcessMetrics, standby_exposition
from cluster.core.leadership import FollowingState
from cluster.security.keys import KeyStore

METRICS: Final = "/metrics"
LIVE: Final = "/live"


def standby_routes(
    state: Callable[[], FollowingState], process: ProcessMetrics, keys: KeyStore | None, origins: OriginPolicy
) -> Mapping[str, ASGIApp]:
    """Return the application of each path that a standby answers. /metrics needs an API key if there are ``keys``."""

    async def metrics(request: Request) -> Response:
        of_process = await anyio.to_thread.run_sync(process.exposition)
        return Response(standby_exposition(state()) + of_process, media_type=CONTENT_TYPE_LATEST)

    routes = [
        DeclaredRoute(METRICS, metrics, access=Access.ADMIN, methods=["GET", "HEAD"]),
        DeclaredRoute(LIVE, answer_live, access=Access.ANYONE, methods=["GET", "HEAD"]),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    own = RequestMiddleware(app, lambda *_: None, Authorizer(routes, KeyUsage(keys) if keys else None), origins)
    return {METRICS: own, LIVE: own}
