"""Sessions of people who signed in with an API key in a browser, and the cookie that carries them.

A session is a random token. It ends 12 hours after the sign-in, with a sign-out, with its key, or with this process:
only its hash is kept, in memory. This module knows no routes.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import Scope

from cluster.api.key_usage import KeyUsage
from cluster.api.page_limits import MAX_SESSIONS, SESSION_S, SESSIONS_OF_KEY
from cluster.core.errors import Unauthenticated
from cluster.security.keys import ApiKey

SESSION: Final = "macpipe.session"
"""Key in the ASGI scope: the token of the session that authorized the request."""
_SECURE: Final = "__Host-macpipe"
"""Name of the cookie over TLS. Browsers take this prefix only from the host itself, with Secure and the path /."""
_PLAIN: Final = "macpipe"


@dataclass(frozen=True, slots=True)
class _Session:
    key_id: str
    began: float


class BrowserSessions:
    """The sessions of one coordinator. A full table drops the oldest session, of the same key first."""

    def __init__(self, key_usage: KeyUsage, clock: Callable[[], float] = time.monotonic) -> None:
        self._key_usage = key_usage
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        """By the token's hash, oldest first."""

    def open(self, key: ApiKey) -> str:
        """Begin a session of ``key`` and return its token."""
        self._drop_ended()
        own = [digest for digest, session in self._sessions.items() if session.key_id == key.id]
        for digest in own[: max(0, len(own) + 1 - SESSIONS_OF_KEY)]:
            del self._sessions[digest]
        if len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = _Session(key.id, self._clock())
        return token

    def find(self, token: str) -> ApiKey:
        """Return the key of a session. Raises ``Unauthenticated`` if it has ended, or its key was revoked."""
        session = self._sessions.get(_digest(token))
        if session is None or self._clock() - session.began >= SESSION_S:
            raise _ended()
        key = self._key_usage.find_by_id(session.key_id)
        if key is None:
            self.close(token)
            raise _ended()
        return key

    def close(self, token: str) -> None:
        """End a session, if there is one with that token."""
        self._sessions.pop(_digest(token), None)

    def _drop_ended(self) -> None:
        oldest = self._clock() - SESSION_S
        for digest in [digest for digest, session in self._sessions.items() if session.began <= oldest]:
            del self._sessions[digest]


def session_token(scope: Scope) -> str:
    """Return the token in the request's cookie; "" if it has none."""
    cookies: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name == b"cookie":
            cookies |= cookie_parser(value.decode("latin-1"))
    return cookies.get(_cookie_name(scope), "")


def set_session(response: Response, scope: Scope, token: str) -> None:
    """Have the browser keep ``token`` until the session ends. Scripts cannot read it, and no other site sends it."""
    response.set_cookie(
        _cookie_name(scope),
        token,
        max_age=round(SESSION_S),
        secure=_is_encrypted(scope),
        httponly=True,
        samesite="strict",
    )


def clear_session(response: Response, scope: Scope) -> None:
    """Have the browser forget the session."""
    response.delete_cookie(_cookie_name(scope), secure=_is_encrypted(scope), httponly=True, samesite="strict")


def _cookie_name(scope: Scope) -> str:
    return _SECURE if _is_encrypted(scope) else _PLAIN


def _is_encrypted(scope: Scope) -> bool:
    """Return whether the request came over TLS. Without it, the port listens on loopback only."""
    return bool(scope["scheme"] == "https")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _ended() -> Unauthenticated:
    return Unauthenticated(
        "the session has ended: it lasts 12 hours, and ends with its key and with the coordinator; sign in again",
        code="session_ended",
    )
