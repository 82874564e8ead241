"""Who may enter a route: each declares what it needs, and one that declares nothing lets nobody in."""

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
"""In a request's scope: whether who asks may know more than that somebody answers here."""
KEY: Final = "macpipe.key"
"""In a request's scope: the key that it came with, if it needed one."""


class Access(StrEnum):
    """What a route needs, where there is a cluster: nothing, or a key of a scope."""

    ANYONE = "anyone"
    INFERENCE = "inference"
    ADMIN = "admin"


class DeclaredRoute(Route):
    """A route that says what it needs."""

    def __init__(self, path: str, endpoint: Any, *, access: Access, methods: Sequence[str]) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.access = access


class Authorizer:
    """In front of ``routes``. Without ``accounts`` there is no cluster: who is on this machine is let in."""

    def __init__(self, routes: Sequence[BaseRoute], accounts: KeyUsage | None = None) -> None:
        self._routes, self._accounts = tuple(routes), accounts

    @contextmanager
    def authorize(self, scope: Scope, headers: Headers) -> Iterator[ApiKey | None]:
        """While the request is answered; yields its key.

        Raises ``Unauthenticated``, ``Forbidden`` or ``LimitReached``.
        """
        needed = self.required_access(scope)
        if needed is None:
            raise Forbidden(f"{scope['path']} declares nobody who may use it")
        scope[TRUSTED] = self._accounts is None
        if self._accounts is None:
            yield None
            return
        given = credentials(headers)
        if needed is Access.ANYONE:
            scope[TRUSTED] = self._find_key(given)
            yield None
            return
        scope[KEY] = key = self._accounts.identify(given)
        if not key.scope.covers(KeyScope(needed.value)):
            raise Forbidden(f"{scope['path']} needs a key of the scope {needed}; {key.name} is one for {key.scope}")
        with self._accounts.request(key):
            scope[TRUSTED] = True
            yield key

    def required_access(self, scope: Scope) -> Access | None:
        """What the route needs that would answer; a key of any kind where there is none. None: nobody gets in."""
        matches = [(route.matches(scope)[0], route) for route in self._routes]
        for wanted in (Match.FULL, Match.PARTIAL):
            found = next((route for match, route in matches if match is wanted), None)
            if found is not None:
                return getattr(found, "access", None)
        return Access.INFERENCE

    def figures(self, key: ApiKey | None) -> dict[str, str]:
        """Headers that say what the key has left."""
        return self._accounts.figures(key) if self._accounts and key else {}

    def _find_key(self, given: Sequence[str]) -> bool:
        assert self._accounts
        try:
            return bool(given and self._accounts.identify(given))
        except MacpipeError:
            return False


def credentials(headers: Headers) -> tuple[str, ...]:
    """The texts that may be a key, as OpenAI's and as Anthropic's clients send it."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    found = (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip())
    return tuple(dict.fromkeys(filter(None, found)))
