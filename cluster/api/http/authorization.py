"""Authorizes HTTP requests. Each route declares its access level; a route without one denies every request.

Routes of the page also accept the cookie of a session. A cookie is sent by any page of the same site, so these routes
check that the request comes from the page itself. No other route reads a cookie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from cluster.api.http.browser_sessions import SESSION, BrowserSessions, session_token
from cluster.api.http.origin_policy import is_same_origin
from cluster.api.key_usage import KeyUsage
from cluster.core.errors import Forbidden, MacpipeError
from cluster.security.keys import ApiKey, KeyScope

TRUSTED: Final = "macpipe.trusted"
"""Key in the ASGI scope: whether the caller is authorized, and so may see details such as the version."""
KEY: Final = "macpipe.key"
"""Key in the ASGI scope: the API key of the request, if the route needs one."""
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES: Final = frozenset({"same-origin", "none"})
"""Values of Sec-Fetch-Site of requests by the page, or by a person who types an address."""


class Access(StrEnum):
    """What a route requires in a cluster: nothing, or a key with a scope."""

    ANYONE = "anyone"
    INFERENCE = "inference"
    ADMIN = "admin"


class DeclaredRoute(Route):
    """A route with a declared access level. Its requests count towards the limits of their key."""

    counted = True

    def __init__(self, path: str, endpoint: Any, *, access: Access, methods: Sequence[str]) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.access = access


class PageRoute(DeclaredRoute):
    """A route for the page: it accepts a session's cookie. ``counted``: as for an API route, such as a chat."""

    def __init__(
        self, path: str, endpoint: Any, *, access: Access, methods: Sequence[str], counted: bool = False
    ) -> None:
        super().__init__(path, endpoint, access=access, methods=methods)
        self.methods = set(methods)  # without HEAD, which Starlette adds
        self.counted = counted


class Authorizer:
    """Authorizes requests for ``routes``. Without ``key_usage`` there is no cluster: callers on this Mac may do all."""

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        key_usage: KeyUsage | None = None,
        sessions: BrowserSessions | None = None,
    ) -> None:
        self._routes = tuple(routes)
        self._key_usage = key_usage
        self._sessions = sessions

    @contextmanager
    def authorize(self, scope: Scope, headers: Headers) -> Iterator[ApiKey | None]:
        """Authorize a request and yield its key; keep the context open until the request is answered.

        Raises ``Unauthenticated``, ``Forbidden`` or ``LimitReached``.
        """
        route = self._match(scope)
        needed = Access.INFERENCE if route is None else getattr(route, "access", None)
        if needed is None:
            raise Forbidden(f"{scope['path']} declares no access level, so nobody may use it")
        given = credentials(headers)
        if isinstance(route, PageRoute) and not given:
            check_same_page(scope, headers)
        scope[TRUSTED] = self._key_usage is None
        if self._key_usage is None:
            yield None
            return
        if needed is Access.ANYONE:
            scope[TRUSTED] = self._has_valid_key(given)
            yield None
            return
        scope[KEY] = key = self._identify(route, scope, given)
        if not key.scope.covers(KeyScope(needed.value)):
            raise Forbidden(
                f"{scope['path']} requires a key with the scope {needed}; the key {key.name} has the scope {key.scope}"
            )
        counted = not isinstance(route, PageRoute) or route.counted
        with self._key_usage.count_request(key) if counted else nullcontext():
            scope[TRUSTED] = True
            yield key

    def rate_limit_headers(self, key: ApiKey | None) -> dict[str, str]:
        """Return the rate limit headers of the key."""
        return self._key_usage.rate_limit_headers(key) if self._key_usage and key else {}

    def _match(self, scope: Scope) -> BaseRoute | None:
        matches = [(route.matches(scope)[0], route) for route in self._routes]
        for wanted in (Match.FULL, Match.PARTIAL):
            found = next((route for match, route in matches if match is wanted), None)
            if found is not None:
                return found
        return None

    def _identify(self, route: BaseRoute | None, scope: Scope, given: Sequence[str]) -> ApiKey:
        """Return the key in the headers, or on routes of the page that of the session. Raises ``Unauthenticated``."""
        assert self._key_usage
        if not given and self._sessions and isinstance(route, PageRoute) and (token := session_token(scope)):
            key = self._sessions.find(token)
            scope[SESSION] = token
            return key
        return self._key_usage.identify(given)

    def _has_valid_key(self, given: Sequence[str]) -> bool:
        assert self._key_usage
        try:
            return bool(given and self._key_usage.identify(given))
        except MacpipeError:
            return False


def check_same_page(scope: Scope, headers: Headers) -> None:
    """Check that a request without a key in its headers was sent by the page. Raises ``Forbidden``.

    Browsers send Origin with each request that changes something. With others, they send Sec-Fetch-Site.
    """
    origin = headers.get("origin")
    if scope["method"] not in _SAFE:
        if origin is None or not is_same_origin(origin, headers.get("host", "")):
            raise Forbidden(
                f"{scope['path']} takes only requests of its own page; send the header Origin with this address, or an "
                "API key in a header"
            )
    elif headers.get("sec-fetch-site", "none") not in _OWN_SITES:
        raise Forbidden(f"pages of other sites may not read {scope['path']}")


def credentials(headers: Headers) -> tuple[str, ...]:
    """Return the possible keys in the headers ``authorization`` (OpenAI) and ``x-api-key`` (Anthropic)."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    found = (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip())
    return tuple(dict.fromkeys(filter(None, found)))
