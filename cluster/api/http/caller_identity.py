"""The caller of an HTTP request and its deadline.

The caller's name is its API key's id, else a hash of the credential that it sent, else its address.
"""

from __future__ import annotations

import hashlib
import math
import time
from typing import Final

from starlette.requests import Request

from cluster.api.http.authorization import KEY
from cluster.api.key_usage import client_of
from cluster.api.requests import Caller
from cluster.core.errors import InvalidRequest

TIMEOUT_HEADER: Final = "x-request-timeout"
"""Request header: seconds that the whole answer may take. Without it there is no deadline."""
MAX_TIMEOUT_S: Final = 86_400.0
_DEADLINE: Final = "macpipe.deadline"
"""Key in the ASGI scope, since a request may wait long for its model before it is submitted."""


def caller_of(request: Request, default_max_tokens: int | None) -> Caller:
    """Return the caller. ``default_max_tokens`` None allows as many tokens as the context.

    Raises ``InvalidRequest`` for an invalid deadline.
    """
    return Caller(client_name(request), deadline_of(request), default_max_tokens)


def deadline_of(request: Request) -> float | None:
    """Return when the answer must be complete, by the monotonic clock and from the first call on; None: never.

    Raises ``InvalidRequest`` for an invalid header.
    """
    if _DEADLINE not in request.scope:
        request.scope[_DEADLINE] = _deadline(request.headers.get(TIMEOUT_HEADER))
    deadline: float | None = request.scope[_DEADLINE]
    return deadline


def client_name(request: Request) -> str:
    """Return the name under which a request is counted for fair queueing, cached prefixes and the byte budget."""
    key = request.scope.get(KEY)
    if key is not None:
        return client_of(key)
    credential = request.headers.get("authorization") or request.headers.get("x-api-key")
    address = request.client.host if request.client else ""
    return hashlib.sha256(credential.encode()).hexdigest() if credential else f"http:{address}"


def _deadline(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"the header {TIMEOUT_HEADER} is {given[:32]!r}; it must be a number of seconds up to {MAX_TIMEOUT_S:.0f}",
            field=TIMEOUT_HEADER,
        )
    return time.monotonic() + seconds
