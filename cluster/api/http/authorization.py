"""Authorizes HTTP requests. Each route declares its access level; a route without one denies every request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from cluster.api.key_usage import KeyUsage
from cluster.core.errors import Forbidden, MacpipeError
from cluster.security.keys import ApiKey, KeyScope

TRUSTED: Final = "macpipe.trusted"
"""Key in the ASGI scope: whether the caller is authorized, and so may see details such as the version."""
KEY: Final = "macpipe.key"
"""Key in the ASGI scope: the API key of the request, if the route needs one."""


class Access(StrEnum):
    """What a route requires in a cluster: nothing, or a key with a scope."""

    ANYONE = "anyone"
    INFERENCE = "inference"
    ADMIN = "admin"


class DeclaredRoute(Route):
    """A route with a declared access level."""

    def __init__(self, path: str, endpoint: Any, *, access: Access, methods: Sequence[str]) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.access = access


class Authorizer:
    """Authorizes requests for ``routes``. Without ``key_usage`` there is no cluster: callers on this Mac may do all."""

    def __init__(self, routes: Sequence[BaseRoute], key_usage: KeyUsage | None = None) -> None:
        self._routes = tuple(routes)
        self._key_usage = key_usage

    @contextmanager
    def authorize(self, scope: Scope, headers: Headers) -> Iterator[ApiKey | None]:
        """Authorize a request and yield its key; keep the context open until the request is answered.

        Raises ``Unauthenticated``, ``Forbidden`` or ``LimitReached``.
        """
        needed = self.required_access(scope)
        if needed is None:
            raise Forbidden(f"{scope['path']} declares no access level, so nobody may use it")
        scope[TRUSTED] = self._key_usage is None
        if self._key_usage is None:
            yield None
            return
        given = credentials(headers)
        if needed is Access.ANYONE:
            scope[TRUSTED] = self._has_valid_key(given)
            yield None
            return
        scope[KEY] = key = self._key_usage.identify(given)
        if not key.scope.covers(KeyScope(needed.value)):
            raise Forbidden(
                f"{scope['path']} requires a key with the scope {needed}; the key {key.name} has the scope {key.scope}"
            )
        with self._key_usage.count_request(key):
            scope[TRUSTED] = True
            yield key

    def required_access(self, scope: Scope) -> Access | None:
        """Return the access level of the matching route; INFERENCE if none matches. None denies."""
        matches = [(route.matches(scope)[0], route) for route in self._routes]
        for wanted in (Match.FULL, Match.PARTIAL):
            found = next((route for match, route in matches if match is wanted), None)
            if found is not None:
                return getattr(found, "access", None)
        return Access.INFERENCE

    def rate_limit_headers(self, key: ApiKey | None) -> dict[str, str]:
        """Return the rate limit headers of the key."""
        return self._key_usage.rate_limit_headers(key) if self._key_usage and key else {}

    def _has_valid_key(self, given: Sequence[str]) -> bool:
        assert self._key_usage
        try:
            return bool(given and self._key_usage.identify(given))
        except MacpipeError:
            return False


def credentials(headers: Headers) -> tuple[str, ...]:
    """Return the possible keys in the headers ``authorization`` (OpenAI) and ``x-api-key`` (Anthropic)."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    found = (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip())
    return tuple(dict.fromkeys(filter(None, found)))
