"""/api/session: signs a browser in with an API key, out again, and tells who is signed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from starlette.requests import Request

from cluster.api.http.body import Form, read
from cluster.api.http.browser_sessions import BrowserSessions, clear_session, session_token, set_session
from cluster.api.http.json_response import Json
from cluster.api.key_usage import KeyUsage
from cluster.api.page_limits import MAX_LOGIN_BYTES
from cluster.core.errors import InvalidRequest, Unauthenticated
from cluster.security.keys import ApiKey, KeyScope
from cluster.security.limits import MAX_KEY_CHARS


class LoginForm(Form):
    """The body of a sign-in. It is short, since anyone may send one."""

    most_bytes: ClassVar[int] = MAX_LOGIN_BYTES
    key: Annotated[str, Field(max_length=MAX_KEY_CHARS)]


@dataclass(frozen=True, slots=True)
class Login:
    """The routes' handlers. Without a cluster there are no keys, and both fields are None."""

    key_usage: KeyUsage | None
    sessions: BrowserSessions | None

    async def show(self, request: Request) -> Json:
        """Return who is signed in. ``problem`` says why a session has ended."""
        if self.sessions is None:
            return _described(None, required=False)
        token = session_token(request.scope)
        if not token:
            return _described(None)
        try:
            return _described(self.sessions.find(token))
        except Unauthenticated as e:
            return _described(None, problem=e.sentence)

    async def sign_in(self, request: Request) -> Json:
        """Begin a session. Raises ``Unauthenticated`` for a wrong key."""
        form = await read(request, LoginForm)
        if self.key_usage is None or self.sessions is None:
            raise InvalidRequest("this coordinator has no cluster, so no key is needed", field="key")
        key = self.key_usage.identify((form.key.strip(),))
        self.sessions.close(session_token(request.scope))
        response = _described(key)
        set_session(response, request.scope, self.sessions.open(key))
        return response

    async def sign_out(self, request: Request) -> Json:
        """End the session of the request's cookie, if there is one."""
        if self.sessions:
            self.sessions.close(session_token(request.scope))
        response = _described(None, required=self.sessions is not None)
        clear_session(response, request.scope)
        return response


def _described(key: ApiKey | None, *, required: bool = True, problem: str = "") -> Json:
    """Return who is signed in; without a cluster everybody on this Mac may do all."""
    scope = key.scope if key else None if required else KeyScope.ADMIN
    facts = {"required": required, "name": key.name if key else None, "scope": scope, "problem": problem or None}
    return Json(facts, headers={"cache-control": "no-store"})
