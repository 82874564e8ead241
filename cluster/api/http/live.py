"""GET /api/events: what the page shows of the cluster, as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import PurePath
from typing import Any

from starlette.requests import Request

from cluster.api.background_load import BackgroundLoad
from cluster.api.cluster_feed import ClusterFeed
from cluster.api.http.browser_sessions import SESSION, BrowserSessions
from cluster.api.http.caller_identity import client_name
from cluster.api.http.errors import openai_error
from cluster.api.http.json_response import new_id
from cluster.api.http.model_names import ModelNames
from cluster.api.http.sse import COMMENT, EventStream, event
from cluster.api.key_usage import revoked_error
from cluster.api.page_limits import FEED_REQUESTS
from cluster.api.request_service import RequestService
from cluster.core.errors import MacpipeError
from cluster.core.json_types import to_json_types


class Live:
    """The route's handler. A stream ends with its session or its key."""

    def __init__(
        self,
        service: RequestService,
        names: ModelNames,
        loads: BackgroundLoad,
        feed: ClusterFeed,
        sessions: BrowserSessions | None,
    ) -> None:
        self._coordinator = service.coordinator
        self._key_usage = service.key_usage
        self._names = names
        self._loads = loads
        self._sessions = sessions
        self._feed = feed

    async def __call__(self, request: Request) -> EventStream[bytes]:
        return EventStream(self._watch(request), _SnapshotEncoder(), new_id("events-"))

    @asynccontextmanager
    async def _watch(self, request: Request) -> AsyncIterator[AsyncIterator[bytes]]:
        with self._feed.join():
            async with aclosing(self._authorized(request)) as events:
                yield events

    async def _authorized(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Yield snapshots while the request's session or key is valid. Raises ``Unauthenticated`` after that."""
        async with aclosing(self._feed.snapshots(self._snapshot)) as snapshots:
            async for snapshot in snapshots:
                self._check(request)
                yield snapshot

    def _check(self, request: Request) -> None:
        token = request.scope.get(SESSION)
        if token and self._sessions:
            self._sessions.find(token)
        elif self._key_usage and self._key_usage.is_revoked(client_name(request)):
            raise revoked_error()

    async def _snapshot(self) -> bytes:
        state = await self._coordinator.snapshot(ask=False)
        facts = to_json_types(state)
        facts["requests_live"] = len(state.requests)
        facts["requests"] = facts["requests"][:FEED_REQUESTS]
        for deployment in facts["deployments"]:
            del deployment["model"]  # a folder's path is private
            for replica in deployment["replicas"]:
                replica["requests_live"] = len(replica["requests"])
                replica["requests"] = replica["requests"][:FEED_REQUESTS]
        loading = to_json_types(self._loads.state())
        if loading:
            loading["model"] = PurePath(loading["model"]).name
        return event({**facts, **self._models(), "loading": loading, "now": time.time()}, "cluster")

    def _models(self) -> dict[str, Any]:
        """Return the default model under its public name, since a folder's path is private, and all models' names."""
        names = [name for model_info in self._names.loaded() for name in self._names.public_names(model_info)]
        try:
            model = self._names.id_of(self._names.resolve(None))
        except MacpipeError:
            model = ""
        return {"model": model, "models": [*names, *self._names.unloaded()]}


class _SnapshotEncoder:
    """Sends snapshots, which are encoded once for all viewers, as they are."""

    def begin(self) -> Iterable[bytes]:
        return ()

    def encode(self, e: bytes) -> Iterable[bytes]:
        return (e,)

    def end(self) -> Iterable[bytes]:
        return ()

    def idle(self) -> bytes:
        return COMMENT

    def fail(self, error: MacpipeError) -> bytes:
        return event(openai_error(error), "failure")
